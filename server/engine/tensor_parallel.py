"""Several processes that run one model together. The first one, the leader, is the server; the others are workers.

The leader sends each step's inputs to the workers. All run the step, each with its part of the model and of the KV cache, and
add up the outputs of every attention and FFN. Only the leader schedules and draws. A worker ends with the leader.

Run as a module, this file is a worker.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ladimo.checkpoint import choose_device, choose_dtype, read_config
from ladimo.checkpoint.sharded import load_shard
from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.backends.choose import NUM_THREADS
from ladimo.model.inputs import PrefillSegment, RoutingTables, StepInputs
from ladimo.model.sharding import Shard
from ladimo.model.transformer import MoeTransformer
from server.engine.config import EngineConfig
from server.engine.model_runner import affordable_blocks

# A worker waits for the next step as long as the leader lives.
FOREVER = timedelta(days=3650)
# To start a process and to import torch.
START_SECONDS = 300.0

logger = logging.getLogger(__name__)


class Group:
    """The connection of one process to the others. Tensors of steps are sent as float64, which holds all their numbers."""

    def __init__(self, place: Path, shard: Shard, device: torch.device) -> None:
        self.shard, self.device = shard, device
        self._caches: list[KVCache] = []  # each process has its part of them, in the same order
        kinds = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(kinds, init_method=f"file://{place}", rank=shard.rank, world_size=shard.size, timeout=FOREVER)
        self.reduce(torch.zeros(1, device=device))  # connects the GPUs

    def reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over all processes."""
        dist.all_reduce(tensor)

    def smallest(self, number: int) -> int:
        """The smallest of the numbers that the processes give."""
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def send(self, inputs: StepInputs, kv_cache: KVCache, tables: RoutingTables) -> None:
        """Send one step to the workers: its inputs, which KV cache it uses, and the rows of the policy table that it uses."""
        cache = next((place for place, known in enumerate(self._caches) if known is kv_cache), len(self._caches))
        if cache == len(self._caches):
            self._caches.append(kv_cache)
        assert inputs.slot_mapping is not None and inputs.block_table is not None and inputs.context_lens is not None
        used = inputs.policy_ids.unique()
        segments = [[each.row, each.start, each.length, each.context_len] for each in inputs.prefill]
        parts = [
            *(inputs.input_ids, inputs.positions, inputs.policy_ids, inputs.slot_mapping, inputs.context_lens),
            *(inputs.block_table, torch.tensor(segments), used, tables.rows[used], tables.allowed[used]),
        ]
        payload = torch.cat([part.flatten().to("cpu", torch.float64) for part in parts])
        sizes = (len(inputs.input_ids), *inputs.block_table.shape, len(segments), len(used), inputs.num_decode, len(payload))
        dist.broadcast(torch.tensor([cache, kv_cache.k.shape[1], *sizes]), 0)
        dist.broadcast(payload, 0)

    def receive(self, tables: RoutingTables, allocate: Callable[[int], KVCache]) -> tuple[StepInputs, KVCache]:
        """Wait for the next step. Its rows of the policy table are written into `tables`. The step asks for no logits.

        `allocate` makes a KV cache of so many blocks.
        """
        header = torch.zeros(9, dtype=torch.int64)
        dist.broadcast(header, 0)
        cache, num_blocks, tokens, sequences, width, segments, used, num_decode, total = header.tolist()
        payload = torch.empty(total, dtype=torch.float64)
        dist.broadcast(payload, 0)
        counts = (tokens, tokens, tokens, tokens, sequences, sequences * width, 4 * segments, used)
        *numbers, rules = payload.split([*counts, total - sum(counts)])
        ids, positions, policies, slots, lengths, blocks, parts, rows = (each.long().to(self.device) for each in numbers)
        rules, allowed = rules.split([used * tables.rows[0].numel(), used * tables.allowed[0].numel()])
        tables.rows[rows] = rules.view(used, *tables.rows.shape[1:]).to(tables.rows)
        tables.allowed[rows] = allowed.view(used, *tables.allowed.shape[1:]).to(tables.allowed)
        if cache == len(self._caches):
            self._caches.append(allocate(num_blocks))
        inputs = StepInputs(
            input_ids=ids,
            positions=positions,
            policy_ids=policies,
            slot_mapping=slots,
            block_table=blocks.view(sequences, width),
            context_lens=lengths,
            num_decode=num_decode,
            prefill=tuple(PrefillSegment(*segment) for segment in parts.view(segments, 4).tolist()),
            logit_indices=ids[:0],
        )
        return inputs, self._caches[cache]


def lead(directory: Path, config: EngineConfig) -> tuple[MoeTransformer, EngineConfig]:
    """Start the workers and load the leader's part of the model. Steps of this model run in all processes.

    Also returns the configuration with what follows: the size of the KV cache, which must be the same in all processes, and no
    CUDA graphs. The workers end with the model. Raises ValueError for a model or a machine that does not fit, and if a worker
    ends while it starts.
    """
    shard = Shard(0, config.tensor_parallel_size)
    if config.quantize is not None:
        raise ValueError(f"tensor_parallel_size {shard.size}: it cannot be combined with quantize")
    shard.config(read_config(directory))  # raises before a process starts
    device = _device(config, shard)
    place = Path(tempfile.mkdtemp(prefix="ladimo-"))
    workers = [_start(directory, config, place, Shard(rank, shard.size)) for rank in range(1, shard.size)]
    try:
        _await_all(workers, place)
        group = Group(place / "store", shard, device)
        model, num_blocks = _load(directory, config, group)
    except BaseException:
        _end(workers)
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)  # the processes have found each other
    weakref.finalize(model, _end, workers)
    model.register_forward_pre_hook(lambda _, step: group.send(*step))
    logger.info("%d processes run the model together", shard.size)
    return model, replace(config, kv_cache_blocks=num_blocks, cuda_graphs=False)


def work(directory: Path, config: EngineConfig, place: Path, shard: Shard) -> None:
    """Run steps as a worker, until the leader ends or a step fails."""
    device = _device(config, shard)
    (place / str(shard.rank)).touch()
    group = Group(place / "store", shard, device)
    model, _ = _load(directory, config, group)
    shape = (config.max_policies + 1, model.config.num_hidden_layers, model.config.max_num_experts)
    tables = RoutingTables.empty(*shape, device, config.batch_budgets)
    with torch.inference_mode():
        while True:
            inputs, kv_cache = group.receive(
                tables, lambda num_blocks: model.backend.allocate_cache(model.config, num_blocks, config.block_size)
            )
            model.backend.begin_step(len(inputs.input_ids))
            model.step(inputs, kv_cache, tables)


def _device(config: EngineConfig, shard: Shard) -> torch.device:
    device = choose_device(config.device)
    if device.type == "cpu":
        return device
    if torch.cuda.device_count() < shard.size:
        raise ValueError(f"tensor_parallel_size {shard.size}: this machine has {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", shard.rank)
    torch.cuda.set_device(device)
    return device


def _load(directory: Path, config: EngineConfig, group: Group) -> tuple[MoeTransformer, int]:
    """The process's part of the model, and the number of blocks of the KV cache that every process can hold."""
    dtype = choose_dtype(config.dtype, directory, group.device)
    model = load_shard(directory, dtype, group.device, group.shard, group.reduce, config.max_model_len)
    model.backend.num_threads = max(1, NUM_THREADS // group.shard.size)
    context = config.max_model_len or model.config.max_position_embeddings
    affordable = affordable_blocks(model, config.block_size, context, config.max_num_seqs)
    return model, config.kv_cache_blocks or group.smallest(affordable)


def _start(directory: Path, config: EngineConfig, place: Path, shard: Shard) -> "subprocess.Popen[bytes]":
    """Start a worker. It ends when its standard input ends, so when the leader ends in whatever way."""
    options = {"directory": str(directory), "place": str(place), "shard": asdict(shard), "config": asdict(config)}
    command = [sys.executable, "-m", "server.engine.tensor_parallel", json.dumps(options)]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def _await_all(workers: "Sequence[subprocess.Popen[bytes]]", place: Path) -> None:
    """Wait until every worker is about to connect."""
    deadline = time.monotonic() + START_SECONDS
    while not all((place / str(rank)).exists() for rank in range(1, len(workers) + 1)):
        if any(worker.poll() is not None for worker in workers) or time.monotonic() > deadline:
            raise ValueError(f"tensor_parallel_size {len(workers) + 1}: a process did not start")
        time.sleep(0.02)


def _end(workers: "Sequence[subprocess.Popen[bytes]]") -> None:
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.close()
    for worker in workers:
        worker.wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_with_leader() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main(arguments: Sequence[str]) -> int:
    """A worker process. Signals are for the leader, which may still need its workers while it drains."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_leader, daemon=True).start()
    options: dict[str, Any] = json.loads(arguments[0])
    shard = Shard(**options["shard"])
    try:
        work(Path(options["directory"]), EngineConfig(**options["config"]), Path(options["place"]), shard)
    except (ValueError, RuntimeError) as error:  # the leader fails with it, and reports it
        print(f"ladimo-server: part {shard.rank} of the model: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

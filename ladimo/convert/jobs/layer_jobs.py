"""Work on the candidate layers of a conversion, one after another or in parallel processes."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ladimo.convert.data.calibration import Calibration
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.jobs.parallel import run_jobs
from ladimo.convert.jobs.ray_jobs import run_jobs_on_ray
from ladimo.convert.progress import reporting, track
from ladimo.convert.run import Run
from ladimo.model.layers import Ffn

logger = logging.getLogger(__name__)

Work = Callable[[Run, int, Ffn, LayerData], None]  # works on one layer; at the end, its record is in the workspace


def work_on_layers(run: Run, calibration: Calibration, work: Work) -> None:
    """Call `work` for every unfinished candidate layer, with its FFN's inputs and outputs in the dense model.

    With several jobs or Ray, `work` must be picklable.
    """
    missing = [index for index in run.candidates if run.workspace.layer_record(index) is None]
    if len(missing) < len(run.candidates):
        logger.info("resuming: %d of %d layers are done", len(run.candidates) - len(missing), len(run.candidates))
    blocks, num_fit = torch.cat((calibration.fit, calibration.holdout)), calibration.fit.numel()
    if run.jobs == 1 and run.ray is None:
        for index, mlp, inputs, targets in run.dense.ffn_data(blocks, missing):
            work(run, index, mlp, LayerData.cut(inputs, targets, num_fit))
        return

    def items() -> Iterator[LayerJob]:
        for index, _, inputs, targets in run.dense.ffn_data(blocks, missing):
            job = LayerJob(run, work, index, num_fit)
            run.workspace.save_tensors(job.data, {"inputs": inputs, "targets": targets})
            yield job

    if run.ray is not None:
        done = run_jobs_on_ray(do_layer_job, items(), run.ray, run.jobs, gpus=float(run.dense.device.type == "cuda"))
    else:
        assert run.jobs is not None
        done = run_jobs(do_layer_job, items(), run.jobs, threads=max(1, torch.get_num_threads() // run.jobs))
    for _ in track(done, "finished layers", len(missing)):
        pass


@dataclass(frozen=True, slots=True)
class LayerJob:
    """One layer for a worker process. `data` is the file in the workspace with its inputs and outputs."""

    run: Run
    work: Work
    index: int
    num_fit: int

    def __str__(self) -> str:
        return f"layer {self.index}"

    @property
    def data(self) -> str:
        return f"layers/{self.index}/data.safetensors"


def do_layer_job(job: LayerJob) -> None:
    if job.run.workspace.layer_record(job.index) is not None:
        return  # by a worker that died before it could say so
    data = job.run.workspace.load_tensors(job.data)
    with reporting():
        cut = LayerData.cut(data["inputs"], data["targets"], job.num_fit)
        for index in track([job.index], str(job)):
            job.work(job.run, index, job.run.dense.ffn(index), cut)
    job.run.workspace.remove(job.data)

"""What a report says: report.json -> a document. A section whose data is not there is left out, as methods differ.

Every number comes from the record. Layers run down, policies across.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ladimo.convert.policies.choose import NAMED
from ladimo.convert.report.charts import (
    FAINT,
    Axis,
    Bar,
    Cell,
    Point,
    Series,
    bar_chart,
    comparison_panels,
    heatmap,
    line_chart,
)
from ladimo.convert.report.page import Document, Figure, Fold, Section, Table, Tile

Report = Mapping[str, Any]
LIMITS = (1.01, 1.03, 1.05, 1.1, 1.2)  # perplexity ratios that quality guards are shown for


def document(report: Report) -> Document:
    """Raises KeyError, TypeError, IndexError or AttributeError where the record is not as `ladimo convert` writes it."""
    made = [
        _frontier(report),
        _policies(report),
        _tasks(report),
        _comparison(report),
        _throughput(report),
        _widths(report),
        _layers(report),
        _training(report),
        _depth(report),
        _routing(report),
        _conditions(report),
    ]
    return Document(
        title=f"{report['model']}: conversion report",
        lead=_lead(report),
        tiles=[_tile(entry) for name in NAMED for entry in report["policies"] if entry["policy"] == name],
        sections=[section for section in made if section is not None],
    )


def _lead(report: Report) -> list[str]:
    ordered = sorted(report["policies"], key=lambda entry: entry["active_parameters_ratio"])
    converted, depth = sum(layer["converted"] for layer in report["layers"]), report["num_hidden_layers"]
    tokens = sum(count for split, count in report["conditions"]["tokens"].items() if split != "evaluation")
    cheapest, best = ordered[0], min(ordered, key=lambda entry: entry["perplexity_ratio"])
    text = [
        f"{converted} of the {depth} layers of {_source_name(report)} were converted by method {report['method']['name']}, "
        f"with {tokens:,} tokens of text and {_duration(report['conditions']['training_seconds'])} of training. "
        f"At its most accurate the model runs {_percent(best['active_parameters_ratio'])} of the dense model's parameters per "
        f"token and has {best['perplexity_ratio']:.3f} times its perplexity; at its cheapest "
        f"{_percent(cheapest['active_parameters_ratio'])} and {cheapest['perplexity_ratio']:.3f}."
    ]
    limit = report["recipe"].get("max_perplexity_ratio") or 1.03
    within = _cheapest(report["policies"], limit)
    text.append(
        f"Within {100 * (limit - 1):.3g}% of the dense perplexity the cheapest measured policy is {within['policy']}, which "
        f"saves {_percent(1 - within['active_parameters_ratio'])} of the active parameters."
        if within
        else f"No measured policy stays within {100 * (limit - 1):.3g}% of the dense perplexity."
    )
    if "elastic" in report:
        text.append(
            f"One set of weights serves every budget; the checkpoint holds {report['elastic']['stored_ratio']:.2f} times the "
            f"dense model's parameters."
        )
    return text


def _tile(entry: Report) -> Tile:
    notes = [f"{entry['perplexity_ratio']:.3f} × the dense perplexity"]
    if entry["next_token_agreement"] is not None:
        notes.append(f"{_percent(entry['next_token_agreement'])} same next token")
    return Tile(entry["policy"], _percent(entry["active_parameters_ratio"]), ["of the parameters active", *notes])


def _frontier(report: Report) -> Section:
    points, policies = report["frontier"]["points"], {entry["policy"]: entry for entry in report["policies"]}
    batches = sorted({point["batch"] for point in points})
    everything = [_point_of(entry) for entry in report["policies"]]
    x_axis = _covering("active parameters", [point.x for point in everything], "%")
    y_axis = _covering("perplexity / dense", [1.0, *(point.y for point in everything)])
    figures = []
    for batch in batches:
        own = [point["policy"] for point in points if point["batch"] == batch]
        own.sort(key=lambda name: policies[name]["active_parameters_ratio"])
        series = [
            Series("frontier", [_point_of(policies[name], name if name in NAMED else "") for name in own]),
            Series("beaten", [_point_of(entry) for name, entry in policies.items() if name not in own], FAINT, line=False),
        ]
        chart = line_chart(
            f"Frontier at batch {batch}", [one for one in series if one.points], x_axis, y_axis, guides=[(1.0, "dense model")]
        )
        caption = (
            "Nothing that reads fewer parameters for one token is as accurate."
            if batch == 1
            else f"Nothing that reads fewer parameters for {batch} tokens at once is as accurate."
        )
        figures.append(Figure(chart, caption))
    asked = report["recipe"].get("max_perplexity_ratio")
    rows = []
    for limit in sorted({*LIMITS, *([asked] if asked else [])}):
        found = _cheapest(report["policies"], limit)
        name = f"{limit:g}{' (asked for)' if limit == asked else ''}"
        rows.append([name, *([found["policy"], *_figures_of(found)] if found else ["none", "", "", "", ""])])
    header = ["perplexity / dense at most", "cheapest policy", "active", "perplexity / dense", "same next token", "KL (nats)"]
    guard = Table(header, rows, "Quality guards: the cheapest measured policy within a limit.")
    text = "Each point is a policy, measured end to end on the evaluation text; grey ones are beaten at this batch size."
    return Section("What it costs, what it keeps", [text], [*figures, guard])


def _policies(report: Report) -> Section:
    batches: dict[str, list[str]] = {entry["policy"]: [] for entry in report["policies"]}
    for point in report["frontier"]["points"]:
        batches[point["policy"]].append(str(point["batch"]))
    rows = [
        [entry["policy"], _percent(entry["active_parameters_ratio"]), f"{entry['perplexity']:.3f}", *_figures_of(entry)[1:]]
        + [", ".join(batches[entry["policy"]]) or "no", entry["description"]]
        for entry in report["policies"]
    ]
    header = [
        "policy",
        "active",
        "perplexity",
        "perplexity / dense",
        "same next token",
        "KL (nats)",
        "frontier of batch",
        "rules",
    ]
    text = f"The dense model's perplexity on the same text is {report['source']['perplexity']:.3f}."
    return Section("Policies", [text], [Table(header, rows)])


def _tasks(report: Report) -> Section | None:
    tasks = report.get("tasks")
    if not tasks:
        return None
    names = list(dict.fromkeys(entry["policy"] for task in tasks for entry in task["policies"]))
    rows = []
    for task in tasks:
        scores = {entry["policy"]: entry for entry in task["policies"]} | ({"dense": task["dense"]} if task["dense"] else {})
        cells = [
            f"{_percent(scores[name]['accuracy'])} ± {_percent(scores[name]['stderr'])}" if name in scores else ""
            for name in ["dense", *names]
        ]
        rows.append([task["task"], f"{task['items']:,}", *cells])
    return Section("Tasks", ["Accuracy ± its standard error."], [Table(["task", "items", "dense", *names], rows)])


def _comparison(report: Report) -> Section | None:
    entries = report.get("comparison")
    if not entries:
        return None
    targets = sorted({entry["target"] for entry in entries}, reverse=True)
    runs = dict.fromkeys((entry["tokens"], entry["method"]) for entry in entries)
    found = {
        (entry["tokens"], entry["method"], entry["target"]): f"{entry['perplexity_ratio']:.4f} ± {entry['spread']:.4f}"
        for entry in entries
    }
    rows = [[name, f"{tokens:,}", *(found.get((tokens, name, target), "") for target in targets)] for tokens, name in runs]
    header = ["method", "tokens", *(f"{_percent(target)} active" for target in targets)]
    table = Table(
        header, rows, "Perplexity over the dense model's by budget, ± half the distance from the best seed to the worst."
    )
    text = "Methods on the same model, tokens and evaluation text; bars reach from the best seed to the worst."
    return Section("Against other methods", [text], [*map(Figure, comparison_panels(entries)), table])


def _throughput(report: Report) -> Section | None:
    measured = report.get("throughput")
    if not measured:
        return None
    costs = {entry["policy"]: entry["active_parameters_ratio"] for entry in report["policies"]} | {"dense": 1.0}
    results = [entry for entry in measured["results"] if entry["policy"] in costs]
    dense = {entry["batch"]: entry["tokens_per_second"] for entry in results if entry["policy"] == "dense"}
    series = []
    for batch in sorted(dense):
        own = [entry for entry in results if entry["batch"] == batch]
        points = [
            Point(100 * costs[entry["policy"]], entry["tokens_per_second"] / dense[batch],
                  f"{entry['policy']}: {entry['tokens_per_second']:,.1f} tokens/s",
                  entry["policy"] if batch == min(dense) else "")
            for entry in own
        ]  # fmt: skip
        series.append(Series(f"batch {batch}", sorted(points, key=lambda point: point.x)))
    chart = line_chart(
        "Decoding speed", series, Axis("active parameters", unit="%"), Axis("speed / dense model"), guides=[(1.0, "dense")]
    )
    rows = [[e["policy"], str(e["batch"]), f"{e['tokens_per_second']:,.1f}", _percent(costs[e["policy"]])] for e in results]
    conditions = ", ".join(f"{name} {value}" for name, value in measured["conditions"].items())
    table = Table(["policy", "batch", "tokens / s", "active"], rows)
    return Section("Speed", [conditions], [Figure(chart, "The dense model in the same engine is 1.", table)])


def _widths(report: Report) -> Section:
    """Which share of each layer runs: the budgets' widths where a method has them, each policy's rules else."""
    rows = [str(index) for index in range(report["num_hidden_layers"])]
    if "elastic" in report:
        budgets, experts = report["elastic"]["budgets"], report["elastic"]["experts"]
        columns = [budget["policy"] for budget in budgets]
        cells = [[_width_cell(budget, layer, experts) for budget in budgets] for layer in range(len(rows))]
        numbers = [[cell.text for cell in line] for line in cells]
        targets = ", ".join(f"{budget['policy']} {_percent(budget['target'])}" for budget in budgets)
        text = f"How many of a layer's {experts} experts each budget keeps. Active parameters asked for: {targets}."
        if any(budget.get("routed") for budget in budgets):
            text += " An r marks routed layers: so many experts run, which ones a router decides for each token."
        title = "Experts kept per layer and budget"
    else:
        policies = report["policies"]
        columns = [entry["policy"] for entry in policies]
        most = max((count or 0.0 for entry in policies for count in entry["experts_per_token"]), default=0.0) or 1.0
        cells = [[_rule_cell(entry, layer, most) for entry in policies] for layer in range(len(rows))]
        numbers = [[_rule_text(entry, layer) for entry in policies] for layer in range(len(rows))]
        text = "The rule of each layer under each policy; the stronger the colour, the more experts run per token."
        title = "Rule per layer and policy"
    table = Table(["layer", *columns], [[row, *line] for row, line in zip(rows, numbers, strict=True)])
    figures = [Figure(heatmap(title, columns, rows, cells, "layer"), numbers=table), _damage(report["layers"])]
    return Section("Where the parameters go", [text], [figure for figure in figures if figure is not None])


def _width_cell(budget: Report, layer: int, experts: int) -> Cell:
    width, routed = budget["widths"][layer], layer in budget.get("routed", ())
    hint = f"layer {layer}, {budget['policy']}: {width} of {experts} experts{', routed' * routed}"
    return Cell(width / experts, f"{width}r" if routed else str(width), hint)


def _rule_cell(entry: Report, layer: int, most: float) -> Cell:
    count = entry["experts_per_token"][layer]
    hint = f"layer {layer}, {entry['policy']}: {_rule_text(entry, layer)}"
    return Cell(1.0 if count is None else count / most, entry["rule_names"][layer], hint)


def _rule_text(entry: Report, layer: int) -> str:
    name, count = entry["rule_names"][layer], entry["experts_per_token"][layer]
    return name if count is None else f"{name}: {count:.2f}"


def _layers(report: Report) -> Section:
    figures = [_sensitivity(report), _oracle(report["layers"])]
    return Section("Layers", [], [*(figure for figure in figures if figure is not None), _layer_table(report)])


def _sensitivity(report: Report) -> Figure | None:
    layers = [layer for layer in report["layers"] if layer.get("converted_alone_perplexity") is not None]
    if not layers:
        return None
    dense = report["holdout_dense_perplexity"]
    bars = []
    for layer in layers:
        rise = 100 * (layer["converted_alone_perplexity"] / dense - 1)
        kept = "" if layer["converted"] else ", stays dense"
        bars.append(Bar(rise, f"layer {layer['layer']}: {rise:+.2f}% perplexity{kept}", faint=not layer["converted"]))
    every = -(-len(bars) // 16)
    names = [(number + 0.5, str(layer["layer"])) for number, layer in enumerate(layers) if number % every == 0]
    chart = bar_chart("Sensitivity: one layer converted at a time", bars, "layer", Axis("rise in perplexity", unit="%"), names)
    return Figure(chart, "Perplexity on the holdout with only that layer converted. Grey layers stay dense.")


def _damage(layers: Sequence[Report]) -> Figure | None:
    damage = [layer for layer in layers if layer.get("damage")]
    if not damage:
        return None
    widths = sorted({int(n) for layer in damage for n in layer["damage"]})
    series = [
        Series(
            f"layer {layer['layer']}",
            [Point(n, layer["damage"][str(n)]) for n in widths if str(n) in layer["damage"]],
        )
        for layer in damage
    ]
    chart = line_chart(
        "Damage of one narrower layer",
        series,
        Axis("experts kept", whole=True),
        Axis("KL to dense, nats", log=True),
        ordinal=True,
    )
    numbers = Table(
        ["layer", *map(str, widths)],
        [
            [str(layer["layer"]), *(f"{layer['damage'][str(n)]:.2e}" if str(n) in layer["damage"] else "" for n in widths)]
            for layer in damage
        ],
    )
    return Figure(
        chart,
        "Divergence from the dense model's predictions when only that layer is narrowed: what the solver trades.",
        numbers,
    )


def _oracle(layers: Sequence[Report]) -> Figure | None:
    nested = [layer for layer in layers if layer.get("nested", {}).get("oracle_errors")]
    if not nested:
        return None
    widths = sorted({int(n) for layer in nested for n in layer["nested"]["oracle_errors"]})
    cells = [[_oracle_cell(layer, str(n)) for n in widths] for layer in nested]
    rows = [str(layer["layer"]) for layer in nested]
    chart = heatmap("Could routing pay? Oracle / static error", list(map(str, widths)), rows, cells, "layer · experts")
    ratios = [float(cell.text) for line in cells for cell in line if cell]
    caption = (
        "Error of an oracle that picks each token's best experts, without repair, over that of the same number of fixed ones, "
        f"repaired. Below 1 (coloured) routing has room, of which a real router gets a part: {sum(r < 1 for r in ratios)} of "
        f"{len(ratios)} cases here."
    )
    numbers = Table(
        ["layer", *map(str, widths)],
        [[row, *(cell.text if cell else "" for cell in line)] for row, line in zip(rows, cells, strict=True)],
    )
    return Figure(chart, caption, numbers)


def _oracle_cell(layer: Report, width: str) -> Cell | None:
    errors, oracle = layer["nested"]["errors"].get(width), layer["nested"]["oracle_errors"].get(width)
    if not errors or oracle is None:
        return None
    hint = f"layer {layer['layer']}, {width} experts: oracle {oracle:.4f}, static {errors:.4f}"
    return Cell(1 - oracle / errors, f"{oracle / errors:.2f}", hint)


def _layer_table(report: Report) -> Table:
    """One row per layer; columns that no layer has are left out."""
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("layer", "layer", str),
        ("converted", "converted", lambda value: "yes" if value else "no"),
        ("perplexity / dense, alone", "alone", _form(".4f")),
        ("error before", "initial_error", _form(".3f")),
        ("error after", "error", _form(".3f")),
        ("best weight", "mean_best_weight", _form(".3f")),
        ("TOP1 error, own weight", "kept_error", _form(".3f")),
        ("TOP1 error, weight 1", "one_error", _form(".3f")),
        ("busiest expert / even", "busiest", _form(".2f")),
        ("error, half the experts", "half_error", _form(".4f")),
        ("ridge", "ridge", _form(".2g")),
        ("seconds", "seconds", _form(".1f")),
    ]
    values = []
    for layer in report["layers"]:
        found = {**layer.get("profile", {}), **layer.get("nested", {}), **layer}
        if "load" in found:
            found["busiest"] = max(found["load"]) * len(found["load"])
        if found.get("errors"):
            found["half_error"] = found["errors"][str((len(found["errors"]) + 1) // 2)]
        if "converted_alone_perplexity" in found:
            found["alone"] = found["converted_alone_perplexity"] / report["holdout_dense_perplexity"]
        values.append(found)
    known = [column for column in columns if any(column[1] in found for found in values)]
    rows = [[form(found[key]) if key in found else "" for _, key, form in known] for found in values]
    return Table([name for name, _, _ in known], rows)


def _training(report: Report) -> Section | None:
    figures = [_loss_curves(report["layers"]), _initialisation(report), _polish(report), _layer_errors(report)]
    shown = [figure for figure in figures if figure is not None]
    return Section("Training", [], shown) if shown else None


def _loss_curves(layers: Sequence[Report]) -> Figure | None:
    trained = [layer for layer in layers if layer.get("curve")]
    if not trained:
        return None
    series = [_curve(f"layer {layer['layer']}", layer["curve"], "holdout", layer.get("initial_error")) for layer in trained]
    chart = line_chart("Loss of each layer", series, Axis("step"), Axis("error / variance", log=True), ordinal=True)
    caption = "Squared error on held-out tokens over the variance of the FFN's output: 1 is as bad as answering its mean."
    return Figure(chart, caption, _curve_table("layer", series))


def _initialisation(report: Report) -> Figure | None:
    found = report.get("initialisation")
    if not found:
        return None
    series = [_curve(name, curve, "holdout") for name, curve in found["curves"].items()]
    chart = line_chart("What the source's weights are worth", series, Axis("step"), Axis("error / variance", log=True))
    caption = (
        f"Layer {found['layer']} trained for {found['steps']} steps from the split weights and from random ones of the same "
        f"size, alike in all else."
    )
    return Figure(chart, caption, _curve_table("start", series))


def _polish(report: Report) -> Figure | None:
    budgets = [budget for budget in report.get("elastic", {}).get("budgets", ()) if budget.get("curve")]
    if not budgets:
        return None
    series = [_curve(budget["policy"], budget["curve"], "kl") for budget in budgets]
    chart = line_chart("End-to-end distillation", series, Axis("step"), Axis("KL to dense, nats", log=True))
    held = [
        f"{budget['policy']} {budget['curve'][0]['holdout']:.4f} to {budget['curve'][-1]['holdout']:.4f}"
        for budget in budgets
        if budget["curve"][0].get("holdout") and budget["curve"][-1].get("holdout")
    ]
    caption = "Divergence of each budget's predictions from the dense model's, on the batches in training."
    caption += f" Held out: {', '.join(held)}." if held else ""
    return Figure(chart, caption, _curve_table("budget", series))


def _layer_errors(report: Report) -> Figure | None:
    """Of budgets that were distilled layer by layer."""
    budgets = [budget for budget in report.get("elastic", {}).get("budgets", ()) if budget.get("layer_errors")]
    if not budgets:
        return None
    series = [
        Series(budget["policy"], [Point(int(layer), after) for layer, (_, after) in budget["layer_errors"].items()])
        for budget in budgets
    ]
    chart = line_chart("Layer by layer", series, Axis("layer"), Axis("error / variance", log=True))
    caption = (
        "What each layer leaves of the difference between the student's hidden states and the dense model's, on held-out "
        "tokens, after training; the table has it before, too."
    )
    rows = []
    for layer in sorted({int(layer) for budget in budgets for layer in budget["layer_errors"]}):
        pairs = [budget["layer_errors"].get(str(layer)) for budget in budgets]
        rows.append([str(layer), *("-" if pair is None else f"{pair[0]:.4f} to {pair[1]:.4f}" for pair in pairs)])
    return Figure(chart, caption, Table(["layer", *(budget["policy"] for budget in budgets)], rows))


def _depth(report: Report) -> Section | None:
    entries = report.get("depth")
    if not entries:
        return None
    hints = [
        f"{entry['converted']} layers: {entry['perplexity_ratio']:.4f} × perplexity, "
        f"{_percent(entry['active_parameters_ratio'])} active, {_percent(entry['next_token_agreement'])} same next token"
        for entry in entries
    ]
    shares = {"active parameters": "active_parameters_ratio", "same next token": "next_token_agreement"}
    lines = [
        Series(name, [Point(entry["converted"], 100 * entry[key], hint) for entry, hint in zip(entries, hints, strict=True)])
        for name, key in shares.items()
    ]
    damage = [Point(entry["converted"], entry["perplexity_ratio"], hint) for entry, hint in zip(entries, hints, strict=True)]
    x_axis = Axis("converted layers, least damaging first", whole=True)
    kept = line_chart("What is saved, what is kept", lines, x_axis, Axis("of the dense model", unit="%"))
    lost = line_chart("What is lost", [Series("perplexity", damage)], x_axis, Axis("perplexity / dense"))
    rows = [
        [str(entry["converted"]), _percent(entry["active_parameters_ratio"]), f"{entry['perplexity_ratio']:.4f}"]
        + [_percent(entry["next_token_agreement"]), ", ".join(map(str, entry["layers"]))]
        for entry in entries
    ]
    table = Table(["converted", "active", "perplexity / dense", "same next token", "layers"], rows)
    text = "Every point is measured with these layers converted, each under its full rule."
    return Section("How many layers", [text], [Figure(lost), Figure(kept), table])


def _routing(report: Report) -> Section | None:
    routed = [layer for layer in report["layers"] if len(layer.get("profile", {}).get("load", ())) > 1]
    if not routed:
        return None
    most = max(len(layer["profile"]["load"]) for layer in routed)
    even = [[share * len(layer["profile"]["load"]) for share in layer["profile"]["load"]] for layer in routed]
    highest = max(max(loads) for loads in even)
    cells: list[list[Cell | None]] = [
        [
            Cell(load / highest, f"{load:.2f}", f"layer {layer['layer']}, expert {expert}: {load:.3f} × an even share")
            for expert, load in enumerate(loads)
        ]
        for layer, loads in zip(routed, even, strict=True)
    ]
    rows, columns = [str(layer["layer"]) for layer in routed], [str(expert) for expert in range(most)]
    load = heatmap("Load of each expert / an even share", columns, rows, cells, "layer · expert")
    numbers = Table(["layer", *columns], [[row, *(f"{x:.3f}" for x in loads)] for row, loads in zip(rows, even, strict=True)])
    figures = [_histogram(layer, report) for layer in routed if layer["converted"]]
    figures.append(Figure(load, "How often each expert is among the chosen under policy full; 1 is an even load.", numbers))
    dense = [_histogram(layer, report) for layer in routed if not layer["converted"]]
    folds = [Fold(f"The {len(dense)} layers that stay dense", dense)] if dense else []
    text = (
        "The weight of each token's best expert, which the policies' rules are chosen from: near 1 one expert is enough, in "
        "the middle the token decides."
    )
    return Section("Routing", [text], [*figures, *folds])


def _histogram(layer: Report, report: Report) -> Figure:
    index, counts = layer["layer"], layer["profile"]["histogram"]
    bins, tokens = len(counts), sum(counts) or 1
    bars = [
        Bar(100 * count / tokens, f"{number / bins:.2f} to {(number + 1) / bins:.2f}: {count:,} tokens, {count / tokens:.1%}")
        for number, count in enumerate(counts)
    ]
    named = [entry for entry in report["policies"] if entry["policy"] in NAMED and layer["converted"]]
    marks: dict[float, str] = {}
    for entry in named:
        rule = entry["rules"][index]
        if rule["mass"] is not None:
            place = bins * min(rule["mass"], 1.0)
            marks[place] = f"{marks[place]}, {entry['policy']}" if place in marks else entry["policy"]
    x_ticks = [(bins * share, f"{share:g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    chart = bar_chart(f"Layer {index}", bars, "weight of the best expert", Axis("tokens", unit="%"), x_ticks, marks.items())
    rules = " · ".join(f"{entry['policy']} {entry['rule_names'][index]}" for entry in named)
    return Figure(chart, f"Mean {layer['profile']['mean_best_weight']:.3f}. {rules or 'Stays dense'}.", small=True)


def _conditions(report: Report) -> Section:
    conditions, source = report["conditions"], report["source"]
    text = conditions["text"]
    names = text if isinstance(text, str) else ", ".join(Path(file["path"]).name for file in text)
    counts = ", ".join(f"{count:,} {split}" for split, count in conditions["tokens"].items())
    converted = ", ".join(str(layer["layer"]) for layer in report["layers"] if layer["converted"])
    lines = [
        report["method"]["description"],
        f"Source: {_source_name(report)} (SHA-256 {source['sha256'][:12]}). Converted layers: {converted or 'none'}.",
        f"Text: {names}. Tokens: {counts}. {conditions['note']}".strip(),
        f"Perplexity: {conditions['protocol']}",
        f"Measured in {conditions['dtype']} on {conditions['device']}; training took "
        f"{_duration(conditions['training_seconds'])}.",
    ]
    if "profiled" in conditions:
        profiled = conditions["profiled"]
        lines.append(
            f"Policies were profiled again on {Path(profiled['text']['path']).name} ({profiled['tokens']['profile']:,} tokens, "
            f"{profiled['tokens']['evaluation']:,} to evaluate); policies, frontier and the source's perplexity are on it."
        )
    recipe = [[name, str(value)] for name, value in _flat(report["recipe"])]
    return Section("Conditions", lines, [Fold("The whole recipe", [Table(["key", "value"], recipe)])])


def _curve(name: str, curve: Sequence[Report], key: str, start: float | None = None) -> Series:
    """A training curve by step; start: the value at step 0 where the curve begins later."""
    values = {0: start} if start is not None else {}
    values |= {point["step"]: point[key] for point in curve}
    return Series(name, [Point(step, value, f"step {step}: {value:.4g}") for step, value in values.items()])


def _curve_table(what: str, series: Sequence[Series]) -> Table:
    steps = sorted({point.x for one in series for point in one.points})
    rows = []
    for one in series:
        values = {point.x: f"{point.y:.4g}" for point in one.points}
        rows.append([one.name, *(values.get(step, "") for step in steps)])
    return Table([what, *(f"step {step:g}" for step in steps)], rows)


def _point_of(entry: Report, label: str = "") -> Point:
    active, ratio = 100 * entry["active_parameters_ratio"], entry["perplexity_ratio"]
    return Point(active, ratio, f"{entry['policy']}: {active:.1f}% active, {ratio:.4f} × the dense perplexity", label)


def _covering(label: str, values: Sequence[float], unit: str = "") -> Axis:
    """An axis over all of these, so that charts side by side have the same."""
    return Axis(label, unit=unit, low=min(values), high=max(values))


def _cheapest(policies: Sequence[Report], limit: float) -> Report | None:
    within = [entry for entry in policies if entry["perplexity_ratio"] <= limit]
    return min(within, key=lambda entry: (entry["active_parameters_ratio"], entry["perplexity_ratio"]), default=None)


def _figures_of(entry: Report) -> list[str]:
    agreement, kl = entry["next_token_agreement"], entry["kl"]
    return [
        _percent(entry["active_parameters_ratio"]),
        f"{entry['perplexity_ratio']:.3f}",
        "" if agreement is None else _percent(agreement),
        "" if kl is None else f"{kl:.4f}",
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _source_name(report: Report) -> str:
    """As it was given, but of a path on somebody's disk only the last part."""
    name = Path(report["source"]["name"])
    return name.name if name.is_absolute() else str(name)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"


def _form(form: str) -> Callable[[Any], str]:
    return lambda value: format(value, form)

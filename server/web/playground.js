// Completions: streamed, under the chosen routing, alone or beside a second one to compare.
import { byId, complete, fixed, percent } from "./api.js";
import { mostExperts } from "./policies.js";
import { Tokens } from "./tokens.js";

let running = null;

function chosenRouting() {
  const how = document.querySelector("input[name=how]:checked").value;
  if (how === "accuracy") return { accuracy: Number(byId("accuracy").value) };
  if (how === "phases") {
    const first = { policy: byId("first-policy").value, until: byId("phase-end").value };
    return { phases: [first, { policy: byId("then-policy").value }] };
  }
  return how === "policy" ? byId("policy").value : undefined;
}

function show(article, pairs) {
  article.querySelector("dl").replaceChildren(...pairs.map(([name, value]) => {
    const item = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    item.append(dt, dd);
    return item;
  }));
}

// Show one completion in one article. Resolves to its tokens and its end: "done", "stopped" or "failed".
async function run(article, prompt, body) {
  const shown = new Tokens(article, prompt, mostExperts());
  show(article, []);
  const sent = performance.now();
  let first = null, last = null, tokens = 0, routing = null, end = "done";
  try {
    for await (const event of complete(body, running.signal)) {
      last = performance.now();
      routing = event.routing ?? routing;
      for (const choice of event.choices) {
        first ??= last;
        tokens += 1;
        shown.add(choice);
      }
      if (event.usage) tokens = event.usage.completion_tokens;
    }
  } catch (error) {
    end = error.name === "AbortError" ? "stopped" : "failed";
    if (end === "failed") {
      const message = document.createElement("p");
      message.className = "error";
      message.textContent = error.message;
      shown.pre.append(message);
    }
  }
  const rate = tokens > 1 && last > first ? ((tokens - 1) / (last - first) * 1000).toFixed(1) : "–";
  const pairs = [["tokens", tokens], ["tokens/s", rate], ["ms to first token", first ? (first - sent).toFixed(0) : "–"]];
  if (routing) {
    pairs.push(["policy", routing.policy], ["version", routing.version], ["chosen by", routing.reason],
      ["accuracy", fixed(routing.accuracy, 2)], ["active parameters", percent(routing.active_parameters_ratio)],
      ...(routing.bytes_ratio == null ? [] : [["weight bytes", percent(routing.bytes_ratio)]]),
      shown.refinedRows == null ? ["experts per token", fixed(routing.experts_per_token, 2)] : ["refined rows per token", fixed(shown.refinedRows, 0)],
      ...(routing.phases ? [["tokens by phase", routing.phases.map(({ policy, completion_tokens: drawn }) => `${policy} ${drawn}`).join(", ")]] : []));
    article.querySelector("h3").textContent = routing.policy;
  }
  show(article, pairs);
  return { shown, end };
}

// The words and spaces of each text that the other text does not have, found by their longest common subsequence.
export function differences(left, right) {
  const piece = /\s+|[\p{L}\p{N}_]+|./gsu;
  const a = left.match(piece) ?? [], b = right.match(piece) ?? [];
  const width = b.length + 1, longest = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i * width + j] = a[i] === b[j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const marked = [[], []];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      marked[0].push([a[i++], false]);
      marked[1].push([b[j++], false]);
    } else if (j === b.length || (i < a.length && longest[(i + 1) * width + j] >= longest[i * width + j + 1])) {
      marked[0].push([a[i++], true]);
    } else {
      marked[1].push([b[j++], true]);
    }
  }
  return marked;
}

async function start() {
  const [one, two] = document.querySelectorAll(".answer"), comparing = byId("compare").checked;
  const prompt = byId("prompt").value;
  // Compared answers have the same seed, so that they differ only because of the routing.
  const given = byId("seed").value;
  const seed = given === "" ? (comparing ? Math.floor(Math.random() * 2 ** 31) : null) : Number(given);
  const body = {
    prompt, seed, stream: true, stream_options: { include_usage: true }, routing_trace: true,
    max_tokens: Number(byId("max-tokens").value), temperature: Number(byId("temperature").value),
  };
  two.hidden = !comparing;
  one.querySelector("h3").hidden = !comparing;
  for (const article of [one, two]) {
    article.querySelector("pre").replaceChildren();
    article.querySelector(".walk").hidden = true;
    article.querySelector("h3").textContent = "";
    show(article, []);
  }
  running = new AbortController();
  byId("run").disabled = true;
  byId("stop").disabled = false;
  byId("progress").textContent = "Completing…";
  let said = "Failed.";
  try {
    const asked = await run(one, prompt, { ...body, routing: chosenRouting() });
    said = { done: "Done.", stopped: "Stopped.", failed: "Failed." }[asked.end];
    if (comparing && asked.end === "done") {
      // The two run one after the other. At the same time they would share a batch, and their speeds would not be their own.
      const other = await run(two, prompt, { ...body, routing: byId("other").value });
      said = { done: "Done: the same text.", stopped: "Stopped.", failed: "Failed." }[other.end];
      if (other.end === "done" && other.shown.text !== asked.shown.text) {
        const [left, right] = differences(asked.shown.text, other.shown.text);
        asked.shown.mark(left);
        other.shown.mark(right);
        said = "Done; what differs is marked.";
      }
    }
  } finally {
    running = null;
    byId("run").disabled = false;
    byId("stop").disabled = true;
    byId("progress").textContent = said;
  }
}

export function listen(onKnob) {
  byId("accuracy").addEventListener("input", () => {
    byId("accuracy-value").textContent = Number(byId("accuracy").value).toFixed(2);
    document.querySelector("input[name=how][value=accuracy]").checked = true;
    onKnob();
  });
  for (const event of ["change", "click"]) { // a click on the entry that is already chosen counts, too, but is no change
    byId("policy").addEventListener(event, () => { document.querySelector("input[name=how][value=policy]").checked = true; });
    byId("other").addEventListener(event, () => { byId("compare").checked = true; });
    for (const id of ["first-policy", "phase-end", "then-policy"]) {
      byId(id).addEventListener(event, () => { document.querySelector("input[name=how][value=phases]").checked = true; });
    }
  }
  byId("run").addEventListener("click", start);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("prompt").addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) start();
  });
}

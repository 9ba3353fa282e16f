// The experts at work: the counters of /metrics as a table of layers and experts, for the last seconds or since the start. Where
// tokens choose what is refined, a row has groups of neurons, or of words of the output head, in the place of experts.
import { byId, samples } from "./api.js";
import { defaultPolicy, readsBits } from "./policies.js";

const POLL_MILLISECONDS = 2000, WINDOW_MILLISECONDS = 10_000;
const HEAD = Infinity; // the output head comes after the layers
let scrapes = []; // [{at, counts: Map(policy -> Map("layer expert" -> tokens))}], oldest first

async function scrape() {
  const counts = new Map();
  for (const { labels, value } of await samples(readsBits() ? "ladimo_refined_total" : "ladimo_expert_tokens_total")) {
    if (!counts.has(labels.policy)) counts.set(labels.policy, new Map());
    const layer = labels.layer === "head" ? HEAD : labels.layer;
    counts.get(labels.policy).set(`${layer} ${labels.expert ?? labels.group}`, value);
  }
  const at = performance.now();
  scrapes.push({ at, counts });
  // Keep the newest scrape that is older than the window. Counts are relative to it.
  while (scrapes.length > 2 && scrapes[1].at <= at - WINDOW_MILLISECONDS) scrapes.shift();
}

// [layer, [{count, open}]]. count: an expert's choices under a policy, or under all policies. open: whether the policy, or the
// default, may choose the expert. Such experts have a series under the policy.
function tokens(policy) {
  const now = scrapes.at(-1).counts, before = byId("heat-window").value === "start" ? new Map() : scrapes[0].counts;
  const judge = now.get(policy || defaultPolicy()), layers = new Map();
  for (const [name, counts] of now) {
    for (const [place, count] of counts) {
      const [layer, expert] = place.split(" ").map(Number);
      if (!layers.has(layer)) layers.set(layer, []);
      const row = layers.get(layer);
      row[expert] ??= { count: 0, open: judge?.has(place) ?? true };
      if (!policy || name === policy) row[expert].count += count - (before.get(name)?.get(place) ?? 0);
    }
  }
  const complete = row => Array.from(row, expert => expert ?? { count: 0, open: false });
  return [...layers].sort(([a], [b]) => a - b).map(([layer, row]) => [layer, complete(row)]);
}

function cell(name, text, scope) {
  const element = document.createElement(name);
  element.textContent = text;
  if (scope) element.scope = scope;
  return element;
}

function draw() {
  const menu = byId("heat-policy"), names = [...scrapes.at(-1).counts.keys()].sort();
  if ([...menu.options].slice(1).map(option => option.value).join() !== names.join()) {
    const chosen = menu.value;
    menu.replaceChildren(menu.options[0], ...names.map(name => new Option(name, name)));
    menu.value = names.includes(chosen) ? chosen : "";
  }
  const layers = tokens(menu.value), widest = Math.max(0, ...layers.map(([, row]) => row.length));
  const choices = row => row.reduce((sum, { count }) => sum + count, 0);
  const total = layers.reduce((sum, [, row]) => sum + choices(row), 0);
  const missing = readsBits() ? "no token has refined anything yet" : "no token yet, a dense model";
  byId("heat-note").textContent = layers.length
    ? `${total.toLocaleString("en")} ${readsBits() ? "refined neurons and words" : "choices"}`
    : `Nothing to show: ${missing}, or a server without counters per expert (start it with --expert-metrics full).`;
  const head = document.createElement("tr");
  head.append(cell("td", readsBits() ? "group" : "expert"), ...Array.from({ length: widest }, (_, expert) => cell("th", expert, "col")));
  document.querySelector("#heat thead").replaceChildren(...(layers.length ? [head] : []));
  document.querySelector("#heat tbody").replaceChildren(...layers.map(([layer, row]) => {
    const line = document.createElement("tr"), sum = choices(row);
    const shown = row.filter(({ count, open }) => open || count).length;
    const unit = !readsBits() ? "choices" : layer === HEAD ? "words" : "neurons";
    line.append(cell("th", layer === HEAD ? "output head" : `layer ${layer}`, "row"), ...row.map(({ count, open }) => {
      if (!open && !count) {
        const element = cell("td", "");
        element.className = "closed";
        element.title = `not for ${menu.value || `the default, ${defaultPolicy()}`}`;
        return element;
      }
      const share = sum ? count / sum : 0, element = cell("td", sum ? Math.round(100 * share) + " %" : "–");
      // The colour is full from twice an even share on. Even then the number is easy to read.
      element.style.setProperty("--share", (0.55 * Math.min(1, share * shown / 2)).toFixed(3));
      element.title = `${count.toLocaleString("en")} ${unit}`;
      return element;
    }));
    return line;
  }));
}

export function watch() {
  const redraw = () => { if (scrapes.length) draw(); };
  byId("heat-policy").addEventListener("change", redraw);
  byId("heat-window").addEventListener("change", redraw);
  const turn = async () => {
    if (document.visibilityState === "visible" && defaultPolicy()) { // once the policies are known
      try {
        await scrape();
        draw();
      } catch (error) {
        byId("heat-note").textContent = error.message;
      }
    }
    setTimeout(turn, POLL_MILLISECONDS);
  };
  turn();
}

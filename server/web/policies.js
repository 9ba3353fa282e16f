// The server's policies: menus, table, frontier, current default, and the two admin actions.
import { administer, byId, fixed, get, percent } from "./api.js";

const SVG = "http://www.w3.org/2000/svg";
let routing = null;

// The cost of a policy: the time of prompts on the frontier for prompts. Else weight bytes if policies read fewer bits, otherwise
// active parameters.
const cost = figures => figures?.prefill_time_ratio ?? figures?.bytes_ratio ?? figures?.active_parameters_ratio;
const costName = points => points.some(point => point.prefill_time_ratio != null) ? "prompts' time"
  : points.some(point => point.bytes_ratio != null) ? "weight bytes" : "active parameters";

// The point of the frontier for an accuracy: the most accurate of the points that are cheap enough.
function choose(points, accuracy) {
  const costs = points.map(cost);
  const low = Math.min(...costs), high = Math.max(...costs), limit = low + accuracy * (high - low) + 1e-9;
  const allowed = points.filter(point => cost(point) <= limit);
  return allowed.reduce((best, point) => (point.perplexity < best.perplexity ? point : best));
}

function describe(current) {
  const { target } = current;
  if (target.accuracy != null) return `accuracy ${target.accuracy} → ${current.policy}`;
  if (target.auto) return `automatic, accuracy ${fixed(current.accuracy, 2)} → ${current.policy}`;
  return current.policy;
}

// `preferred`: chosen at first, if it is there; otherwise the first name is.
function fillMenu(id, names, preferred) {
  const menu = byId(id), chosen = menu.value || preferred;
  if ([...menu.options].map(option => option.value).join() === names.join()) return; // a change would close an open menu
  menu.replaceChildren(...names.map(name => new Option(name, name)));
  if (names.includes(chosen)) menu.value = chosen;
}

// The cell of a policy that says how far it agrees with accuracy 1 on this server's traffic. None while nothing is replayed.
function agreement(name) {
  if (!routing.shadow) return [];
  const found = routing.shadow.policies[name];
  if (!found) return [["–", "number"]];
  const hint = `${found.answers} answers with ${found.tokens} tokens, KL divergence ${fixed(found.kl, 4)}`;
  return [[percent(found.next_token_agreement), "number", hint]];
}

// The canary, if there is one.
function fillCanary() {
  const { canary } = routing;
  byId("canary").hidden = !canary;
  if (!canary) return;
  const found = canary.shadow;
  const quality = found ? `; it agrees with accuracy 1 on ${percent(found.next_token_agreement)} of ${found.tokens} tokens` : "";
  byId("canary-now").textContent = `${percent(canary.share)} of the requests run under ${describe(canary)}${quality}.`;
}

function fillTable() {
  byId("agreement-name").hidden = !routing.shadow;
  byId("cost-name").textContent = costName(routing.frontier ?? []);
  byId("policies").replaceChildren(...routing.policies.map(policy => {
    const row = document.createElement("tr"), figures = policy.figures, name = document.createElement("th");
    name.scope = "row";
    name.textContent = policy.name + (policy.name === routing.default.policy ? " (default)" : "");
    row.append(name);
    for (const [text, className, hint] of [
      [policy.version, "muted"], [fixed(policy.accuracy, 2), "number"], [percent(cost(figures)), "number"],
      [fixed(figures?.perplexity_ratio, 3), "number"], ...agreement(policy.name), [policy.description, "muted"],
    ]) {
      const cell = row.insertCell();
      cell.textContent = text;
      cell.className = className;
      if (hint) cell.title = hint;
    }
    return row;
  }));
}

const CAUSES = {
  wait: "the wait in the queue", queue: "a filling queue", token: "a large batch", ttft: "the time to the first token", itl: "the time between tokens",
  floor: "the lowest allowed accuracy", room: "room to spare", ceiling: "it failed a short while ago",
};
const SHOWN_CHANGES = 8;

// The figures and the latest changes of automatic control. Hidden while it is off.
function fillAutomatic() {
  const control = routing.automatic_control;
  byId("automatic").hidden = !control;
  if (!control) return;
  const signals = Object.entries(control.signals).map(([name, value]) => `${name} ${percent(value)}`);
  byId("automatic-now").textContent =
    `Accuracy ${fixed(control.accuracy, 2)}; last decision: ${control.direction}, because of ${CAUSES[control.cause]}. ` +
    `Of their targets: ${signals.join(", ")}.`;
  byId("changes").replaceChildren(...control.changes.slice(-SHOWN_CHANGES).reverse().map(change => {
    const row = document.createElement("tr");
    for (const [text, className] of [
      [fixed(change.seconds_ago, 0), "number"], [change.direction, ""], [fixed(change.accuracy, 2), "number"],
      [CAUSES[change.cause], "muted"],
    ]) {
      const cell = row.insertCell();
      cell.textContent = text;
      cell.className = className;
    }
    return row;
  }));
}

export const defaultPolicy = () => routing?.default.policy;

// Whether policies say how many bits of a weight are read. Tokens then choose what is refined: neurons and words.
export const readsBits = () => (routing?.policies ?? []).some(
  policy => policy.head_bits != null || policy.layers.some(rule => (rule?.bits ?? rule?.attention_bits) != null));

// The largest number of experts per layer that a token may run under any policy, as a mean over the expert layers.
export function mostExperts() {
  const means = (routing?.policies ?? []).map(policy => {
    const rules = policy.layers.filter(rule => rule);
    return rules.reduce((sum, rule) => sum + rule.top_k, 0) / rules.length;
  });
  return Math.max(1, ...means.filter(Number.isFinite));
}

export function drawFrontier() {
  const points = routing?.frontier ?? [], svg = byId("frontier");
  byId("frontier-section").hidden = points.length < 2;
  if (points.length < 2) return;
  const chosen = choose(points, Number(byId("accuracy").value));
  const left = 48, right = 540, top = 22, bottom = 220;
  const scale = (values, from, to) => {
    const low = Math.min(...values), span = Math.max(...values) - low || 1;
    return value => from + (value - low) / span * (to - from);
  };
  const ratio = point => point.perplexity_ratio ?? point.perplexity;
  const costs = points.map(cost), ratios = points.map(ratio);
  const x = scale(costs, left + 16, right - 16), y = scale(ratios, bottom - 12, top + 12);
  const add = (name, attributes, text) => {
    const element = svg.appendChild(document.createElementNS(SVG, name));
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text) element.append(text);
    return element;
  };
  svg.replaceChildren();
  const sorted = [...points].sort((a, b) => cost(a) - cost(b));
  add("polyline", { points: sorted.map(p => `${x(cost(p))},${y(ratio(p))}`).join(" ") });
  for (const point of sorted) {
    const cx = x(cost(point)), cy = y(ratio(point));
    const dot = add("circle", { cx, cy, r: point === chosen ? 7 : 4, class: point === chosen ? "chosen" : "point" });
    const title = dot.appendChild(document.createElementNS(SVG, "title"));
    title.textContent = `${point.policy}: ${percent(cost(point))} of the ${costName(points)}, ratio ${fixed(ratio(point), 3)}`;
    if (point.policy === routing.default.policy) add("circle", { cx, cy, r: 10, class: "current" });
    if (points.length <= 8 || point === chosen) {
      const atEnd = cx > right - 90;
      add("text", { x: cx + (atEnd ? -12 : 12), y: cy - 8, "text-anchor": atEnd ? "end" : "start" }, point.policy);
    }
  }
  add("text", { x: left, y: 242 }, percent(Math.min(...costs)));
  add("text", { x: right, y: 242, "text-anchor": "end" }, `${percent(Math.max(...costs))} ${costName(points)}`);
  add("text", { x: 0, y: y(Math.max(...ratios)) + 4 }, Math.max(...ratios).toFixed(2));
  add("text", { x: 0, y: y(Math.min(...ratios)) + 4 }, Math.min(...ratios).toFixed(2));
  add("text", { x: 0, y: 10 }, "perplexity over the dense source's");
  byId("frontier-note").textContent =
    `Accuracy ${Number(byId("accuracy").value).toFixed(2)} serves ${chosen.policy}: ${percent(cost(chosen))} of the ` +
    `${costName(points)}, perplexity ratio ${fixed(chosen.perplexity_ratio, 3)}. ` +
    (routing.prefill_costs ? `Prompts were timed on ${routing.prefill_costs.processor}.`
      : routing.frontier_batch === "prefill" ? "Measured for prompts." : `Measured for batch ${routing.frontier_batch}.`);
  svg.setAttribute("aria-label", `Frontier of ${points.length} points. ${byId("frontier-note").textContent}`);
}

export async function refresh() {
  routing = await get("v1/routing");
  const names = routing.policies.map(policy => policy.name);
  for (const id of ["policy", "other", "new-policy", "then-policy"]) fillMenu(id, names);
  fillMenu("first-policy", names, "fast");
  const knob = Boolean(routing.frontier?.length);
  for (const control of document.querySelectorAll("#accuracy, [value=accuracy], [value=auto], #new-accuracy, #new-itl, #new-ttft, #new-floor")) {
    control.disabled = !knob;
  }
  byId("current").textContent = describe(routing.default);
  byId("default").textContent = `default: ${describe(routing.default)}`;
  for (const [kind, shown] of [["of-experts", !readsBits()], ["of-refined", readsBits()]]) {
    for (const element of document.getElementsByClassName(kind)) element.hidden = !shown;
  }
  fillTable();
  fillAutomatic();
  fillCanary();
  drawFrontier();
}

function newDefault() {
  const kind = document.querySelector("input[name=target]:checked").value;
  if (kind === "policy") return { policy: byId("new-policy").value };
  if (kind === "accuracy") return { accuracy: Number(byId("new-accuracy").value) };
  const target = id => Number(byId(id).value) || null;
  return { auto: { itl_ms: target("new-itl"), ttft_ms: target("new-ttft"), min_accuracy: Number(byId("new-floor").value) } };
}

async function change(method, path, body) {
  const status = byId("operated");
  status.className = "muted";
  try {
    const reply = await administer(method, path, body);
    await refresh();
    const took = reply.swap_seconds == null ? "" : `; it took ${(reply.swap_seconds * 1000).toFixed(1)} ms`;
    status.textContent = `The default is now ${describe(reply.default)}${took}.`;
  } catch (error) {
    status.className = "error";
    status.textContent = error.message;
  }
}

export function listen() {
  byId("operate").addEventListener("submit", event => {
    event.preventDefault();
    change("PUT", "admin/routing/default", newDefault());
  });
  byId("promote").addEventListener("click", () => change("POST", "admin/routing/canary/promote"));
  byId("end-canary").addEventListener("click", () => change("POST", "admin/routing/canary/rollback"));
  byId("roll-back").addEventListener("click", () => change("POST", "admin/routing/rollback"));
  for (const [id, value] of [["new-policy", "policy"], ["new-accuracy", "accuracy"], ["new-itl", "auto"], ["new-ttft", "auto"], ["new-floor", "auto"]]) {
    for (const event of ["change", "click"]) {
      byId(id).addEventListener(event, () => { document.querySelector(`input[name=target][value=${value}]`).checked = true; });
    }
  }
}

// Requests to the server: JSON, streams of events, and samples of /metrics.
export const byId = id => document.getElementById(id);

function headers(key) {
  const value = byId(key).value.trim();
  return { "Content-Type": "application/json", ...(value && { Authorization: `Bearer ${value}` }) };
}

async function checked(reply) {
  if (reply.ok) return reply;
  const text = await reply.text();
  let message = text;
  try { message = JSON.parse(text).error.message; } catch { /* not ours: show it as it is */ }
  throw new Error(message || `status ${reply.status}`);
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers("api-key") }))).json();
}

export async function administer(method, path, body) {
  const reply = await fetch(path, { method, headers: headers("admin-key"), body: body && JSON.stringify(body) });
  return (await checked(reply)).json();
}

export async function ready() {
  const reply = await fetch("health/ready");
  return reply.ok ? "ready" : (await reply.json()).error.code;
}

// Yields the events of a streamed completion.
export async function* complete(body, signal) {
  const options = { method: "POST", headers: headers("api-key"), body: JSON.stringify(body), signal };
  const reply = await checked(await fetch("v1/completions", options));
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// [{labels, value}] of every sample with this name. Prometheus escapes \, " and line ends in label values.
export async function samples(name) {
  const text = await (await checked(await fetch("metrics"))).text();
  const found = [];
  for (const line of text.split("\n")) {
    if (!line.startsWith(name + "{")) continue;
    const labels = {};
    for (const [, label, value] of line.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[label] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    found.push({ labels, value: Number(line.slice(line.lastIndexOf(" ") + 1)) });
  }
  return found;
}

export const percent = x => (x == null ? "–" : (100 * x).toFixed(1) + " %");
export const fixed = (x, digits) => (x == null ? "–" : x.toFixed(digits));

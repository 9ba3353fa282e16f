// The page: starts its parts and keeps them up to date.
import { byId, get, ready } from "./api.js";
import * as experts from "./experts.js";
import * as playground from "./playground.js";
import * as policies from "./policies.js";

const REFRESH_MILLISECONDS = 3000;
let timer = null;

async function refresh() {
  clearTimeout(timer);
  const state = byId("state");
  try {
    state.textContent = await ready();
    state.className = "badge";
    await policies.refresh();
    if (!byId("model").textContent) byId("model").textContent = (await get("v1/models")).data[0].id;
  } catch (error) {
    state.textContent = error.message;
    state.className = "badge error";
  }
  timer = setTimeout(refresh, REFRESH_MILLISECONDS);
}

playground.listen(policies.drawFrontier);
policies.listen();
byId("api-key").addEventListener("change", refresh);
refresh().then(experts.watch); // what is counted depends on the policies

// The API's page. Every address is relative to it, so that it also works behind a proxy that adds a prefix.
const reply = await fetch("openapi.json");
const spec = await reply.json();
spec.servers = [{ url: new URL(".", document.baseURI).href.replace(/\/$/, "") }];
// Without an address of its own the page would ask a public validator.
SwaggerUIBundle({ spec, dom_id: "#docs", deepLinking: true, validatorUrl: null });

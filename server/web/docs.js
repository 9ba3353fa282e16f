// The page of the API. All addresses are relative, so that the page also works behind a proxy that adds a prefix.
const reply = await fetch("openapi.json");
const spec = await reply.json();
spec.servers = [{ url: new URL(".", document.baseURI).href.replace(/\/$/, "") }];
// validatorUrl null: otherwise Swagger UI would send the page's address to a public validator.
SwaggerUIBundle({ spec, dom_id: "#docs", deepLinking: true, validatorUrl: null });

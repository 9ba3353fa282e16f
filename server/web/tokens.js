// The tokens of one answer. Each is shaded by the number of experts that ran for it. For one chosen token, the experts of each layer
// are listed. A token is chosen by pointing at it, or with the slider below the text, for keyboards and screen readers.

function describe(layers, experts) {
  return layers.map((layer, place) => {
    const ran = experts[place];
    return `layer ${layer}: ${ran.length === 1 ? "expert" : "experts"} ${ran.join(", ") || "none"}`;
  }).join("; ");
}

export class Tokens {
  // `most`: the experts per layer with the darkest shade. One expert per layer has the lightest.
  constructor(article, prompt, most) {
    this.pre = article.querySelector("pre");
    this.walk = article.querySelector(".walk");
    this.slider = this.walk.querySelector("input");
    this.told = this.walk.querySelector(".told");
    this.most = most;
    this.layers = [];
    this.items = []; // [{span, text, experts}]
    this.chosen = null;
    const given = document.createElement("span");
    given.className = "prompt";
    given.textContent = prompt;
    this.pre.replaceChildren(given);
    this.walk.hidden = true;
    this.slider.oninput = () => {
      this.choose(Number(this.slider.value) - 1);
      this.chosen.span.scrollIntoView({ block: "nearest" });
    };
    this.pre.onpointerover = event => {
      const place = this.items.findIndex(item => item.span === event.target.closest(".token"));
      if (place >= 0 && this.layers.length) this.choose(place);
    };
  }

  get text() {
    return this.items.map(item => item.text).join("");
  }

  // One streamed choice: its text, and its part of the trace, which has one token.
  add(choice) {
    const trace = choice.routing_trace ?? {};
    this.layers = trace.layers ?? this.layers;
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = choice.text;
    const experts = trace.tokens?.[0] ?? [];
    if (experts.length) {
      const mean = experts.reduce((sum, ran) => sum + ran.length, 0) / experts.length;
      const depth = this.most > 1 ? Math.min(1, Math.max(0, (mean - 1) / (this.most - 1))) : 0;
      span.style.setProperty("--share", (0.06 + 0.49 * depth).toFixed(3));
    }
    this.items.push({ span, text: choice.text, experts });
    this.pre.append(span);
    this.slider.max = this.items.length;
    if (this.layers.length && this.walk.hidden) {
      this.walk.hidden = false;
      this.slider.value = 1;
      this.choose(0);
    }
  }

  choose(place) {
    this.chosen?.span.classList.remove("now");
    const item = this.chosen = this.items[place];
    item.span.classList.add("now");
    const name = item.text ? JSON.stringify(item.text) : "no text of its own";
    this.slider.value = place + 1;
    this.told.textContent = `${place + 1}, ${name}: ${describe(this.layers, item.experts)}`;
    this.slider.setAttribute("aria-valuetext", this.told.textContent);
  }

  // Mark parts of the text: [[piece, different]], which together are the text.
  mark(pieces) {
    let piece = 0, used = 0;
    for (const { span, text } of this.items) {
      const nodes = [];
      for (let at = 0; at < text.length;) {
        const [content, different] = pieces[piece], part = text.slice(at, at + content.length - used);
        const node = document.createElement(different ? "mark" : "span");
        node.textContent = part;
        nodes.push(node);
        at += part.length;
        used += part.length;
        if (used === content.length) [piece, used] = [piece + 1, 0];
      }
      span.replaceChildren(...nodes);
    }
  }
}

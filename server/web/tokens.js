// The tokens of one answer. Each is shaded by the number of experts that ran for it or, where policies say how many bits are read,
// by what it refined: neurons and words that were read at 8 bits instead of 4. For one chosen token, the numbers of each layer are
// listed. A token is chosen by pointing at it, or with the slider below the text, for keyboards and screen readers.

const count = number => number.toLocaleString("en");
const shade = (span, depth) => span.style.setProperty("--share", (0.06 + 0.49 * Math.min(1, Math.max(0, depth))).toFixed(3));

function describeExperts(layers, experts) {
  return layers.map((layer, place) => {
    const ran = experts[place];
    return `layer ${layer}: ${ran.length === 1 ? "expert" : "experts"} ${ran.join(", ") || "none"}`;
  }).join("; ");
}

// `refined`, `refinable`: neurons of each layer, then words of the output head. A place without any is left out: there, the policy
// reads everything at the same bits.
function describeRefined(layers, refined, refinable) {
  const parts = refined.map((number, place) => {
    const of = `${count(number)} of ${count(refinable[place])}`;
    return number ? [place < layers.length ? `layer ${layers[place]}: ${of} neurons` : `output head: ${of} words`] : [];
  });
  return parts.flat().join("; ") || "nothing refined";
}

// The rows of weights of what is refined: a neuron has three, a word one.
const rowsOf = refined => refined.reduce((sum, number, place) => sum + number * (place < refined.length - 1 ? 3 : 1), 0);

export class Tokens {
  // `most`: the experts per layer with the darkest shade. One expert per layer has the lightest. What tokens refined has its
  // lightest and darkest shade at the least and the most in this answer, because it differs little between tokens.
  constructor(article, prompt, most) {
    this.pre = article.querySelector("pre");
    this.walk = article.querySelector(".walk");
    this.slider = this.walk.querySelector("input");
    this.told = this.walk.querySelector(".told");
    this.most = most;
    this.layers = [];
    this.refinable = null;
    this.items = []; // [{span, text, experts, refined, rows}]; the last two only if the model refines
    this.range = [Infinity, 0]; // of `rows`
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
    this.refinable = trace.refinable ?? this.refinable;
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = choice.text;
    const experts = trace.tokens?.[0] ?? [], refined = trace.refined?.[0], rows = refined && rowsOf(refined);
    this.items.push({ span, text: choice.text, experts, refined, rows });
    if (refined) {
      this.shadeRefined(rows);
    } else if (experts.length) {
      const mean = experts.reduce((sum, ran) => sum + ran.length, 0) / experts.length;
      shade(span, this.most > 1 ? (mean - 1) / (this.most - 1) : 0);
    }
    this.pre.append(span);
    this.slider.max = this.items.length;
    if (this.layers.length && this.walk.hidden) {
      this.walk.hidden = false;
      this.slider.value = 1;
      this.choose(0);
    }
  }

  // The mean number of rows of weights that a token refined; null if the model refines nothing.
  get refinedRows() {
    const known = this.items.filter(item => item.refined);
    return known.length ? known.reduce((sum, { rows }) => sum + rows, 0) / known.length : null;
  }

  // Shade the last token, which refined so many rows. If it has the least or the most so far, the shades of all tokens change.
  shadeRefined(rows) {
    const [least, most] = this.range, inside = least <= rows && rows <= most;
    const [from, to] = this.range = [Math.min(least, rows), Math.max(most, rows)];
    for (const item of inside ? this.items.slice(-1) : this.items) {
      if (item.refined && to > 0) shade(item.span, (item.rows - from) / (to - from || 1));
    }
  }

  choose(place) {
    this.chosen?.span.classList.remove("now");
    const item = this.chosen = this.items[place];
    item.span.classList.add("now");
    const name = item.text ? JSON.stringify(item.text) : "no text of its own";
    this.slider.value = place + 1;
    const numbers = item.refined ? describeRefined(this.layers, item.refined, this.refinable) : describeExperts(this.layers, item.experts);
    this.told.textContent = `${place + 1}, ${name}: ${numbers}`;
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

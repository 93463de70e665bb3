// A line chart in SVG with axes, legend and a cursor that reads the values out, by pointer or by arrow keys.

import { h, svg } from "./dom.js";

const HEIGHT = 240; // pixels
const FRAME = { left: 52, right: 14, top: 12, bottom: 40 };
const MOST_POINTS = 1500; // of a line; more cannot be seen
const OUTLIERS = 0.01; // share of the values at either end that does not decide the vertical axis

export class LineChart {
  #at = null; // position of the cursor
  #svg = svg("svg", { "aria-hidden": "true", height: HEIGHT });
  #cursor = svg("g", { class: "cursor", visibility: "hidden" });
  #readout = h("p", { class: "readout" });

  /**
   * @param {object} what `title`; `x` and `y`: labels of the axes; `series`: [{name, values, style}] of one length,
   *   `style` a number that CSS has a colour for; `zero`: draw a line there; `read(i)`: the values at a position, as
   *   text; `moved(i)`: called with the cursor's position, or null.
   */
  constructor(what) {
    Object.assign(this, what);
    this.length = this.series[0].values.length;
    const legend = h("div", { class: "chart-legend" }, ...this.series.map(legendEntry));
    this.plot = h("div", { class: "plot", role: "slider", tabindex: 0, "aria-label": this.title }, this.#svg);
    this.view = h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h("span", {}, this.title), this.series.length > 1 ? legend : null),
      this.plot,
      this.#readout,
    );
    this.#setRange();
    this.#listen();
    this.#show(null);
    new ResizeObserver(() => this.#draw()).observe(this.plot);
  }

  #setRange() {
    const values = this.series.flatMap((line) => Array.from(line.values)).sort((a, b) => a - b);
    const skip = Math.floor(values.length * OUTLIERS);
    let [low, high] = [values[skip], values[values.length - 1 - skip]];
    if (this.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
    const room = 0.06 * (high - low) || 0.5;
    this.range = { low: low - room, high: high + room };
  }

  #listen() {
    this.plot.addEventListener("pointermove", (event) => this.#show(this.#positionOf(event)));
    this.plot.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && this.#show(null));
    this.plot.addEventListener("pointerdown", (event) => this.#show(this.#positionOf(event)));
    this.plot.addEventListener("focus", () => this.plot.matches(":focus-visible") && this.#show(this.#at ?? 0));
    this.plot.addEventListener("blur", () => this.#show(null));
    this.plot.addEventListener("keydown", (event) => this.#key(event));
    Object.entries({ valuemin: 1, valuemax: this.length }).forEach(([name, value]) =>
      this.plot.setAttribute(`aria-${name}`, value),
    );
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [at, last] = [this.#at ?? 0, this.length - 1];
    const page = Math.max(1, Math.round(this.length / 20));
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: page, PageDown: -page };
    const ends = { Home: 0, End: last };
    const next = ends[event.key] ?? (steps[event.key] && at + steps[event.key]);
    if (next === undefined) return;
    event.preventDefault();
    this.#show(Math.min(last, Math.max(0, next)));
  }

  #positionOf(event) {
    const { left, right } = FRAME;
    const box = this.#svg.getBoundingClientRect();
    const share = (event.clientX - box.left - left) / (box.width - left - right);
    return Math.round(Math.min(1, Math.max(0, share)) * (this.length - 1));
  }

  /** Put the cursor at a position, or take it away. */
  #show(at) {
    this.#at = at;
    const text = at === null ? "" : this.read(at);
    this.#readout.textContent = text || "Point at the chart, or use the arrow keys, to read it.";
    this.#readout.classList.toggle("faint", at === null);
    this.plot.setAttribute("aria-valuenow", (at ?? 0) + 1);
    this.plot.setAttribute("aria-valuetext", text || "no token chosen");
    this.#drawCursor();
    this.moved?.(at);
  }

  #draw() {
    this.width = Math.max(200, this.plot.clientWidth);
    const { left, right, top, bottom } = FRAME;
    const [inner, under] = [this.width - left - right, HEIGHT - top - bottom];
    const { low, high } = this.range;
    this.x = (i) => left + (this.length > 1 ? (i / (this.length - 1)) * inner : inner / 2);
    this.y = (value) => top + (1 - (value - low) / (high - low)) * under;
    this.#svg.setAttribute("width", this.width);
    const clip = `clip-${this.title.replace(/\W+/g, "-")}`;
    const area = svg("clipPath", { id: clip }, svg("rect", { x: left, y: top, width: inner, height: under }));
    const lines = svg("g", { "clip-path": `url(#${clip})` }, ...this.series.map((line) => this.#line(line)));
    this.#svg.replaceChildren(area, this.#axes(), lines, this.#cursor);
    this.#drawCursor();
  }

  #axes() {
    const { left, right, top, bottom } = FRAME;
    const [end, foot] = [this.width - right, HEIGHT - bottom];
    const group = svg("g", { class: "axes" });
    const { low, high } = this.range;
    for (const value of ticks(low, high, 5)) {
      const at = this.y(value);
      const grid = this.zero && value === 0 ? "zero" : "grid";
      group.append(svg("line", { class: grid, x1: left, x2: end, y1: at, y2: at }));
      group.append(svg("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, tickText(value)));
    }
    for (const value of ticks(1, this.length, Math.max(2, this.width / 110)).filter(Number.isInteger)) {
      const at = this.x(Math.max(1, value) - 1);
      group.append(svg("line", { class: "grid", x1: at, x2: at, y1: foot, y2: foot + 4 }));
      group.append(svg("text", { x: at, y: foot + 17, "text-anchor": "middle" }, tickText(Math.max(1, value))));
    }
    group.append(svg("line", { class: "axis", x1: left, x2: end, y1: foot, y2: foot }));
    group.append(
      svg("text", { class: "label", x: (left + end) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, this.xLabel),
    );
    const middle = (top + foot) / 2;
    const turned = { transform: `rotate(-90 12 ${middle})`, x: 12, y: middle, "text-anchor": "middle" };
    group.append(svg("text", { class: "label", ...turned }, this.yLabel));
    return group;
  }

  #line({ values, style }) {
    const step = Math.max(1, Math.ceil(this.length / MOST_POINTS));
    const points = [];
    for (let i = 0; i < this.length; i += step) points.push(`${this.x(i).toFixed(1)},${this.y(values[i]).toFixed(1)}`);
    return svg("polyline", { class: `line series-${style}`, points: points.join(" ") });
  }

  #drawCursor() {
    this.#cursor.setAttribute("visibility", this.#at === null ? "hidden" : "visible");
    if (this.#at === null || !this.x) return;
    const at = this.x(this.#at);
    const { top, bottom } = FRAME;
    const dots = this.series.map(({ values, style }) =>
      svg("circle", { class: `dot series-${style}`, cx: at, cy: this.y(values[this.#at]), r: 4 }),
    );
    this.#cursor.replaceChildren(svg("line", { x1: at, x2: at, y1: top, y2: HEIGHT - bottom }), ...dots);
  }
}

function legendEntry({ name, style }) {
  const line = svg("line", { class: `line series-${style}`, x1: 0, x2: 22, y1: 5, y2: 5 });
  return h("span", {}, svg("svg", { width: 22, height: 10, "aria-hidden": "true" }, line), name);
}

/** Round values between two numbers, about as many as wanted. */
export function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  const first = Math.ceil(low / step);
  const count = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: count }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function tickText(value) {
  return value.toLocaleString("en", { maximumSignificantDigits: 4 }).replace("-", "−");
}

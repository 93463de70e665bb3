// One answer of one model: it streams in, shows its reasoning apart, and says how it ended.

import { streamChat } from "./api.js";
import { announce, copyButton, h } from "./dom.js";
import { problemView } from "./problem.js";
import { nats } from "./scale.js";
import { TokenText } from "./tokens.js";

export class Answer {
  state = "waiting"; // then streaming; done, stopped or failed
  #abort = new AbortController();
  #usage = null;
  #started = 0;
  #retry;
  #meta = h("span", { class: "meta" });
  #thoughts = h("div", { class: "text" });
  #reasoning = h("details", { class: "reasoning", hidden: true }, h("summary", {}, "Reasoning"), this.#thoughts);
  #text = h("div", { class: "text content" });
  #foot = h("div", { class: "answer-foot" });
  #content = new TokenText(this.#text);
  #thought = new TokenText(this.#thoughts);

  /**
   * @param {string} model who answers.
   * @param {function()} retry asks the same again.
   */
  constructor(model, retry) {
    this.model = model;
    this.view = h("article", { class: "answer", "aria-label": `Answer of ${model}`, "aria-busy": "true" });
    this.#retry = retry;
    this.#build();
  }

  #build() {
    const head = h("header", { class: "answer-head" }, h("span", { class: "who" }, this.model), this.#meta);
    this.view.append(head, this.#reasoning, this.#text, this.#foot);
  }

  /** What the model said, without its reasoning. */
  get text() {
    return this.#content.text;
  }

  /** Whether the answer belongs to the conversation. */
  get counts() {
    return this.state === "done" || (this.state === "stopped" && this.text !== "");
  }

  get busy() {
    return this.state === "waiting" || this.state === "streaming";
  }

  /** Break the answer off; what came stays. */
  stop() {
    this.#abort.abort();
  }

  /** Ask and show what comes; failures are shown too. */
  async run(body) {
    this.#started = performance.now();
    try {
      for await (const chunk of streamChat(body, this.#abort.signal)) this.#take(chunk);
      this.#end("done");
    } catch (error) {
      if (this.#abort.signal.aborted) return this.#end("stopped");
      this.#end("failed");
      this.#foot.before(problemView(error, this.#retry));
      if (this.text) this.#foot.before(h("p", { class: "note" }, "This answer is not part of the conversation."));
    }
  }

  #take(chunk) {
    if (chunk.usage) this.#usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.state = "streaming";
    this.finish = choice.finish_reason ?? this.finish;
    const { content, reasoning_content: reasoning } = choice.delta ?? {};
    const tokens = choice.logprobs?.content;
    if (reasoning) this.#think(reasoning, content ? null : tokens);
    if (content || (tokens?.length && !reasoning)) this.#say(content ?? "", tokens);
  }

  #think(text, tokens) {
    if (this.#reasoning.hidden) Object.assign(this.#reasoning, { hidden: false, open: true });
    this.#thought.append(text, tokens);
  }

  #say(text, tokens) {
    if (!this.text && !this.#reasoning.hidden) this.#reasoning.open = false;
    this.#content.append(text, tokens);
  }

  #end(state) {
    this.state = state;
    this.#content.finish();
    this.#thought.finish();
    this.view.setAttribute("aria-busy", "false");
    this.view.dataset.state = state;
    this.#meta.textContent = this.#summary().join(" · ");
    if (state === "done" && !this.text) this.#foot.before(h("p", { class: "note" }, "The model said nothing."));
    if (state !== "failed")
      this.#foot.append(
        copyButton(() => this.text),
        this.#again(),
      );
    announce(`${this.model}: ${state === "done" ? "answer complete" : `answer ${state}`}`);
  }

  #again() {
    return h("button", { type: "button", class: "quiet retry", onclick: this.#retry }, "Try again");
  }

  #summary() {
    const parts = [];
    const seconds = (performance.now() - this.#started) / 1000;
    const tokens = this.#usage?.completion_tokens;
    if (this.state === "stopped") parts.push("stopped");
    if (this.finish === "length") parts.push("cut at max tokens");
    if (tokens) parts.push(`${tokens} tokens`, `${(tokens / seconds).toFixed(tokens / seconds < 10 ? 1 : 0)}/s`);
    const { nats: sum, tokens: scored } = this.#content.surprise;
    if (scored) parts.push(`mean ${nats(sum / scored)} nats`);
    return parts;
  }
}

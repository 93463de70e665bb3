// A failure where it happened: what was said, and the way out (a key, waiting, another try).

import { apiKey, setApiKey } from "./api.js";
import { h } from "./dom.js";

const WAIT = 5; // seconds, when a busy server does not say how long

/** The element that shows an error. `retry` tries again; with null nothing can. */
export function problemView(error, retry = null) {
  const view = h("div", { class: "problem", role: "alert" }, h("p", { class: "problem-title" }, title(error)));
  view.append(h("p", { class: "problem-message" }, error.message));
  if (error.status === 401) view.append(keyForm(view, retry));
  else if (retry && (error.status === 429 || error.status === 503))
    view.append(waiting(error.retryAfter ?? WAIT, retry));
  else if (retry) view.append(h("button", { type: "button", class: "retry", onclick: retry }, "Try again"));
  return view;
}

function title(error) {
  if (error.network) return "Connection lost";
  switch (error.status) {
    case 401:
      return apiKey() ? "The API key was refused" : "This service asks for an API key";
    case 429:
      return "The service is busy";
    case 503:
      return "The service is not available";
    case 0:
      return "Something went wrong";
  }
  return error.status >= 500 ? `The server failed (${error.status})` : `The request was refused (${error.status})`;
}

/** Asks for a key; a key given anywhere on the page tries again here too. */
function keyForm(view, retry) {
  const field = h("input", { type: "password", autocomplete: "off", required: true, "aria-label": "API key" });
  const submit = (event) => {
    event.preventDefault();
    setApiKey(field.value);
  };
  const again = () => {
    if (!apiKey()) return;
    document.removeEventListener("apikey", again);
    if (view.isConnected) retry?.();
  };
  document.addEventListener("apikey", again);
  const note = h("small", {}, "Kept in this browser tab until it closes.");
  return h("form", { class: "key-form", onsubmit: submit }, field, h("button", { class: "primary" }, "Use key"), note);
}

/** A button that counts down to the time when trying again makes sense. */
function waiting(seconds, retry) {
  const button = h("button", { type: "button", class: "retry", onclick: retry });
  const until = Date.now() + seconds * 1000;
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left > 0) setTimeout(tick, 250);
  };
  tick();
  return button;
}

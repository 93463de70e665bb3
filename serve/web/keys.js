// Keys that work anywhere on the page, and the dialogs for help and for the API key.

import { apiKey, setApiKey } from "./api.js";
import { byId } from "./dom.js";
import { hideDetails } from "./inspect.js";

/**
 * Listen to the keyboard.
 *
 * @param {object} actions `stop()` (whether there was something to stop), `nextModel()`, `nextTab()`, `focus()`.
 */
export function installKeys(actions) {
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    const action = actionOf(event, actions);
    if (!action) return;
    event.preventDefault();
    action();
  });
}

/** Make the buttons of the dialogs work. */
export function installDialogs() {
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  installKeyDialog();
}

function actionOf(event, actions) {
  const control = (event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey;
  if (event.key === "Escape") return () => hideDetails() || actions.stop();
  if (control && event.key.toLowerCase() === "k") return actions.nextModel;
  if (control && event.key.toLowerCase() === "j") return actions.nextTab;
  if (event.ctrlKey || event.metaKey || event.altKey || writes(event.target)) return null;
  if (event.key === "?") return () => byId("help").showModal();
  return event.key === "/" ? actions.focus : null;
}

/** Whether keys pressed there are text. */
function writes(element) {
  const typed = "textarea, select, input:not([type=radio], [type=checkbox], [type=range])";
  return element.matches?.(typed) ?? false;
}

function installKeyDialog() {
  const [dialog, field] = [byId("key-dialog"), byId("key-field")];
  const refresh = () => (byId("key-button").dataset.set = apiKey() ? "true" : "false");
  byId("key-button").addEventListener("click", () => {
    field.value = "";
    byId("key-forget").hidden = !apiKey();
    dialog.showModal();
  });
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "use" && field.value) setApiKey(field.value);
    if (dialog.returnValue === "forget") setApiKey(null);
    field.value = "";
    dialog.returnValue = "";
  });
  document.addEventListener("apikey", refresh);
  refresh();
}

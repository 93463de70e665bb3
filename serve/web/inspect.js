// Looking at the tokens of a text one by one: with the pointer, by touch, or with the arrow keys.

import { announce, byId } from "./dom.js";

const MARGIN = 8; // pixels between token, details and the window's edge
let shownFor = null; // the token whose details are shown

/**
 * Let people look at the `.token` elements inside a container.
 *
 * @param {HTMLElement} container holds the tokens; it takes the focus.
 * @param {function(HTMLElement): {view: Node, text: string}} describe details of a token, to see and to hear.
 * @param {function(): boolean} enabled whether there is something to see now.
 */
export function inspectable(container, describe, enabled = () => true) {
  let current = null;
  const choose = (token, heard) => {
    current = token;
    hideDetails();
    if (!token || !enabled()) return;
    const { view, text } = describe(token);
    showDetails(token, view);
    if (heard) announce(text);
  };
  const tokenAt = (event) => event.target.closest?.(".token");
  container.addEventListener("pointerover", (event) => tokenAt(event) && choose(tokenAt(event), false));
  container.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && choose(null));
  container.addEventListener("focus", () => container.matches(":focus-visible") && choose(first(container), true));
  container.addEventListener("blur", () => choose(null));
  container.addEventListener("keydown", (event) => {
    const next = enabled() ? target(event, container, current) : null;
    if (!next) return;
    event.preventDefault();
    next.scrollIntoView({ block: "nearest" });
    choose(next, true);
  });
}

/** Take the details of a token away; false when none were shown. */
export function hideDetails() {
  const box = byId("details");
  const shown = !box.hidden;
  box.hidden = true;
  shownFor?.classList.remove("current");
  return shown;
}

function first(container) {
  return container.querySelector(".token");
}

/** The token that an arrow key leads to. */
function target(event, container, current) {
  if (event.ctrlKey || event.metaKey || event.altKey) return null;
  if (event.key === "Home") return first(container);
  if (event.key === "End") return [...container.querySelectorAll(".token")].at(-1);
  const forward = event.key === "ArrowRight" || event.key === "ArrowDown";
  if (!forward && event.key !== "ArrowLeft" && event.key !== "ArrowUp") return null;
  if (!current?.isConnected) return first(container);
  return (forward ? current.nextElementSibling : current.previousElementSibling) ?? current;
}

function showDetails(token, view) {
  const box = byId("details");
  box.replaceChildren(view);
  box.hidden = false;
  shownFor = token;
  token.classList.add("current");
  place(box);
}

/** Below the token, or above it where there is no room; a token may be broken over two lines. */
function place(box) {
  const at = shownFor.getClientRects()[0];
  if (!at || at.bottom < 0 || at.top > innerHeight) return hideDetails();
  const { offsetWidth: width, offsetHeight: height } = box;
  const below = at.bottom + MARGIN + height < innerHeight;
  const left = Math.min(at.left, innerWidth - width - MARGIN);
  box.style.left = `${Math.max(MARGIN, left)}px`;
  box.style.top = `${below ? at.bottom + MARGIN : Math.max(MARGIN, at.top - MARGIN - height)}px`;
}

const follow = () => byId("details").hidden || place(byId("details"));
document.addEventListener("scroll", follow, { capture: true, passive: true });
document.addEventListener("pointerdown", (event) => event.target.closest?.(".token") || hideDetails());

// The page's state in its address, `#tab=compare&model=demo`, so that a link leads to the same view.

/** What the address names: a tab, or null, and model ids. */
export function readAddress() {
  const fields = new URLSearchParams(location.hash.slice(1));
  return { tab: fields.get("tab"), models: fields.getAll("model") };
}

/** Name a tab and models; another tab is a step that the back button undoes. */
export function writeAddress(tab, models) {
  const fields = new URLSearchParams({ tab });
  for (const model of models) fields.append("model", model);
  const hash = `#${fields}`;
  if (hash === location.hash) return;
  const step = readAddress().tab !== null && readAddress().tab !== tab;
  history[step ? "pushState" : "replaceState"](null, "", hash);
}

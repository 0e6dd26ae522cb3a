// Tokens: hover, tap or tab to one, arrow keys to the next; the panel shows the bars that stand in the token table.
(() => {
  "use strict";
  const panel = document.getElementById("inspector");
  const groups = [...document.querySelectorAll(".tokens")];
  const tokensOf = (group) => [...group.querySelectorAll(".t")];
  const uncertain = (token) => token.matches(".c3, .c4, .other");
  let pinned = null; // the token that has the keyboard
  let shown = null;

  for (const group of groups) {
    group.setAttribute("role", "group");
    tokensOf(group).forEach((token, place) => {
      token.setAttribute("role", "button");
      token.tabIndex = place ? -1 : 0;
      token.setAttribute("aria-label", `${token.textContent}, ${token.title || "no probability"}`);
      token.removeAttribute("title");
    });
  }

  function rowOf(token) {
    const group = token.closest(".tokens");
    const table = document.getElementById(group.dataset.rows);
    return table.tBodies[0].rows[tokensOf(group).indexOf(token)];
  }

  function show(token) {
    if (token === shown) return;
    hide();
    const [text, id, probability, entropy, ...more] = rowOf(token).cells;
    const alternatives = more.pop();
    const image = more.map((cell) => ` · ${cell.textContent} nats by the image`).join("");
    const name = document.createElement("b");
    name.textContent = text.textContent;
    const line = document.createElement("p");
    line.append(name, `id ${id.textContent} · ${probability.textContent} · entropy ${entropy.textContent} nats${image}`);
    panel.replaceChildren(line, ...[...alternatives.children].map((child) => child.cloneNode(true)));
    panel.hidden = false;
    place(token);
    token.classList.add("on");
    token.setAttribute("aria-describedby", "inspector");
    shown = token;
  }

  function place(token) {
    if (getComputedStyle(panel).position === "fixed") { // a narrow screen: the panel is a sheet at the bottom
      panel.style.left = panel.style.top = "";
      return;
    }
    const at = token.getBoundingClientRect();
    const above = at.bottom + 8 + panel.offsetHeight > innerHeight && at.top > panel.offsetHeight + 8;
    const width = document.documentElement.clientWidth;
    panel.style.left = `${scrollX + Math.max(8, Math.min(at.left, width - panel.offsetWidth - 8))}px`;
    panel.style.top = `${scrollY + (above ? at.top - panel.offsetHeight - 8 : at.bottom + 8)}px`;
  }

  function hide() {
    if (!shown) return;
    shown.classList.remove("on");
    shown.removeAttribute("aria-describedby");
    panel.hidden = true;
    shown = null;
  }

  function move(token, key) {
    const tokens = tokensOf(token.closest(".tokens"));
    const now = tokens.indexOf(token);
    const next = {
      ArrowRight: () => tokens[now + 1],
      ArrowLeft: () => tokens[now - 1],
      Home: () => tokens[0],
      End: () => tokens[tokens.length - 1],
      ArrowDown: () => tokens.slice(now + 1).find(uncertain),
      ArrowUp: () => tokens.slice(0, now).reverse().find(uncertain),
    }[key];
    if (!next) return false;
    next()?.focus();
    return true;
  }

  document.addEventListener("mouseover", (event) => {
    const token = event.target.closest?.(".tokens .t");
    if (token) show(token);
    else if (pinned) show(pinned);
    else hide();
  });
  document.addEventListener("click", (event) => event.target.closest?.(".tokens .t")?.focus());
  document.addEventListener("focusin", (event) => {
    pinned = event.target.matches(".tokens .t") ? event.target : null;
    if (!pinned) return hide();
    for (const token of tokensOf(pinned.closest(".tokens"))) token.tabIndex = token === pinned ? 0 : -1;
    show(pinned);
    pinned.scrollIntoView({ block: "nearest" });
    place(pinned);
  });
  document.addEventListener("focusout", (event) => {
    if (event.relatedTarget) return;
    pinned = null;
    hide();
  });
  document.addEventListener("keydown", (event) => {
    if (!pinned || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") pinned.blur();
    else if (move(pinned, event.key)) event.preventDefault();
  });
})();

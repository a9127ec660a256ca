"use strict";
// What pages do in the browser: show times in the reader's zone, handle keys, and update
// themselves.

const clock = new Intl.DateTimeFormat("sv-SE", {
  dateStyle: "short", timeStyle: "medium",
});
const weekday = new Intl.DateTimeFormat("en-GB", { weekday: "short" });

const zone = document.getElementById("zone");
if (zone) zone.textContent = clock.resolvedOptions().timeZone;

function showTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const at = new Date(time.dateTime);
    if (!isNaN(at)) time.textContent = `${weekday.format(at)} ${clock.format(at)}`;
  }
}

// Keys as in mail programs: j and k move down and up the rows, x selects one, Enter opens it, / searches.
const isTyping = (element) => element?.isContentEditable
  || element?.matches("input:not([type=checkbox]), select, textarea");

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(document.activeElement)) return;
  const links = [...document.querySelectorAll("tbody tr td > a:first-of-type")];
  const at = links.findIndex((link) => link.closest("tr").contains(document.activeElement));
  if (event.key === "/" && document.getElementById("q")) {
    document.getElementById("q").focus();
  } else if (event.key === "j" || event.key === "k") {
    const step = event.key === "j" ? 1 : -1;
    links[at < 0 ? 0 : Math.min(Math.max(at + step, 0), links.length - 1)]?.focus();
  } else if (event.key === "x" && at >= 0) {
    links[at].closest("tr").querySelector("input[type=checkbox]")?.click();
  } else {
    return;
  }
  event.preventDefault();
});

// Styles do not know that a message in a frame has the focus, to be scrolled by keyboard.
function markFrames() {
  for (const frame of document.querySelectorAll("iframe")) {
    frame.classList.toggle("focused", frame === document.activeElement);
  }
}

window.addEventListener("blur", markFrames);
window.addEventListener("focus", markFrames);
document.addEventListener("focusin", markFrames);

// Clicking a row opens its link. Its text is in front of the link, so that it can be selected.
document.addEventListener("click", (event) => {
  const link = event.target.closest("tbody tr")?.querySelector("td > a");
  if (!link || event.target.closest("a, button, input, label") || !getSelection().isCollapsed) return;
  link.dispatchEvent(new MouseEvent("click", event));
});

// One stream while the page is visible. The server reports that there is a newer version of what is
// shown, and htmx fetches it. The browser reopens a stream that ends; if it gives up, this does.
let source = null;
let again = null;

function follow() {
  const live = document.getElementById("live");
  if (source) source.close();
  source = null;
  if (!live || live.dataset.live === undefined || document.hidden) return;
  const query = new URLSearchParams({ topic: live.dataset.live, version: live.dataset.version });
  source = new EventSource(`${live.dataset.stream}?${query}`);
  source.onopen = () => say("Live", false);
  source.addEventListener("changed", refresh);
  source.onerror = () => {
    say("Not connected", true);
    if (source.readyState === EventSource.CLOSED) later(() => { refresh(); follow(); });
  };
}

function say(text, isLost) {
  const state = document.getElementById("state");
  if (!state || (state.textContent === text && !state.hidden)) return;
  state.hidden = false;
  state.textContent = text;
  state.classList.toggle("lost", isLost);
}

function later(work) {
  clearTimeout(again);
  again = setTimeout(work, 3000);
}

const refresh = () => htmx.trigger(document.body, "live");
const isLive = (event) => event.detail?.ctx?.sourceElement?.id === "live";

// after a failed request, the page stays as it is, and requests again
function failed(event) {
  if (!isLive(event)) return;
  const status = event.detail.ctx.response?.status;
  if (status && status < 500) return;
  say("Not connected", true);
  later(refresh);
}

document.addEventListener("htmx:response:error", failed);
document.addEventListener("htmx:error", failed);

// after the end of a session, go to the login
document.addEventListener("htmx:before:swap", (event) => {
  if (!new URL(event.detail.ctx.response.raw.url).pathname.endsWith("/login")) return;
  event.preventDefault();
  location.reload();
});

document.addEventListener("htmx:after:swap", (event) => {
  const isFetched = isLive(event) && event.detail.ctx.response.status < 500;
  if (isFetched && source?.readyState === EventSource.OPEN) say("Live", false);
  showTimes(document);
  const found = document.querySelector("[data-said]")?.dataset.said;
  if (found !== undefined) document.getElementById("said").textContent = found;
  document.dispatchEvent(new Event("shown"));
});

document.addEventListener("visibilitychange", follow);
window.addEventListener("pagehide", () => source && source.close());
window.addEventListener("pageshow", (event) => event.persisted && follow());

showTimes(document);
follow();
// reload a page that says that something cannot be reached
if (document.querySelector("[data-retry]")) setTimeout(() => location.reload(), 5000);

"use strict";
// What a page does beside showing: times in the reader's zone, questions before changes, and
// following what changes.

const clock = new Intl.DateTimeFormat("sv-SE", {
  dateStyle: "short", timeStyle: "medium",
});
const weekday = new Intl.DateTimeFormat("en-GB", { weekday: "short" });

function showTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const at = new Date(time.dateTime);
    if (!isNaN(at)) time.textContent = `${weekday.format(at)} ${clock.format(at)}`;
  }
}

document.addEventListener("submit", (event) => {
  const question = event.target.dataset.question;
  if (question && !window.confirm(question)) event.preventDefault();
});

// One stream while the page is seen. The server tells that there is a newer version of what is
// shown, and htmx fetches it. A stream that ends is opened again by the browser, and here where the
// browser gives up.
let source = null;
let again = null;

function follow() {
  const live = document.getElementById("live");
  if (source) source.close();
  source = null;
  if (!live || live.dataset.live === undefined || document.hidden) return;
  const query = new URLSearchParams({ topic: live.dataset.live, version: live.dataset.version });
  source = new EventSource(`/console/live?${query}`);
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

// what could not be fetched: what is shown stays, and is asked for again
function failed(event) {
  if (!isLive(event)) return;
  const status = event.detail.ctx.response?.status;
  if (status && status < 500) return;
  say("Not connected", true);
  later(refresh);
}

document.addEventListener("htmx:response:error", failed);
document.addEventListener("htmx:error", failed);

// a session that is over leads to the login
document.addEventListener("htmx:before:swap", (event) => {
  if (new URL(event.detail.ctx.response.raw.url).pathname !== "/console/login") return;
  event.preventDefault();
  location.reload();
});

document.addEventListener("htmx:after:swap", (event) => {
  const isFetched = isLive(event) && event.detail.ctx.response.status < 500;
  if (isFetched && source?.readyState === EventSource.OPEN) say("Live", false);
  showTimes(document);
  document.dispatchEvent(new Event("shown"));
});

document.addEventListener("visibilitychange", follow);
window.addEventListener("pagehide", () => source && source.close());
window.addEventListener("pageshow", (event) => event.persisted && follow());

showTimes(document);
follow();
// a page that says that something can't be reached is asked for again
if (document.querySelector("[data-retry]")) setTimeout(() => location.reload(), 5000);

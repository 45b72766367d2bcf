// The page: who looks, what is known, and when it is drawn.

import { $, mark, say } from "./dom.js";
import { follow } from "./live.js";
import { Mesh } from "./mesh.js";
import * as activity from "./activity.js";
import * as confirm from "./confirm.js";
import * as figures from "./figures.js";
import * as places from "./places.js";
import * as playground from "./playground.js";
import * as requests from "./requests.js";
import * as story from "./story.js";
import * as workers from "./workers.js";

const KEY = "llambo.token";
const THEMES = ["auto", "light", "dark"];

const mesh = new Mesh();
let token = kept();
let leave = null;
let due = 0;
let connected = false;

for (const part of [activity, confirm, figures, places, playground, requests, story, workers]) part.begin();
beginTheme();
beginSignIn();
look();
// Ages go on when nothing happens.
setInterval(() => mesh.known && draw(), 1_000);

// --- looking ---

function look() {
  leave?.();
  story.use(token);
  link("waiting", "Connecting");
  leave = follow(token, {
    message(said) {
      mesh.take(said);
      if (token) keep(token);
      present("board");
      draw();
    },
    state(told) {
      connected = told === "live";
      if (!connected) link("lost", told);
    },
    refused(error) {
      const had = token;
      forget();
      present("signin");
      link("waiting", "Signed out");
      say($("signin-problem"), had ? `${error.message}.` : "");
      $("token").focus();
    },
  });
}

/** Once for each frame, however much is said between two. Hidden tabs have no frames, and need none. */
function draw() {
  if (due) return;
  due = requestAnimationFrame(() => {
    due = 0;
    mesh.age();
    if (connected) link(mesh.problem ? "lost" : "live", mesh.problem ? "The broker does not answer" : "Live");
    figures.show(mesh);
    workers.show(mesh, token);
    requests.show(mesh);
    activity.show(mesh);
    places.show(mesh);
    playground.show(mesh, token);
    story.show(mesh);
    document.title = `${mesh.mesh.ready ?? 0}/${mesh.mesh.workers ?? 0} ready · llambo`;
  });
}

function link(state, text) {
  mark($("link"), "state", state);
  say($("link-text"), text);
}

function present(which) {
  $("board").hidden = which !== "board";
  $("signin").hidden = which !== "signin";
  $("signout").hidden = !token;
}

// --- signing in and out ---

function beginSignIn() {
  $("signin-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = $("token").value.trim();
    $("token").value = "";
    say($("signin-problem"), "");
    look();
  });
  $("signout").addEventListener("click", () => {
    forget();
    look();
  });
}

function forget() {
  token = "";
  keep("");
  mesh.clear();
  story.use("");
  $("story").close();
  $("confirm").close();
}

// Where storage is forbidden a token holds until the page is left.

function kept() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

function keep(what) {
  try {
    if (what) sessionStorage.setItem(KEY, what);
    else sessionStorage.removeItem(KEY);
  } catch {
    // As said above.
  }
}

// --- light and dark ---

function beginTheme() {
  const button = $("theme");
  const chosen = () => document.documentElement.dataset.theme ?? "auto";
  const tell = () => say(button, `Theme: ${chosen()}`);
  tell();
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(chosen()) + 1) % THEMES.length];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("llambo.theme", next);
    } catch {
      // Where storage is forbidden the choice holds for this visit.
    }
    tell();
  });
}

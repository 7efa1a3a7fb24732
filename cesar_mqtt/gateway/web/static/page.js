// The page: uploads, the live queue, consumers and rejections. Everything that comes from the server is shown as text
// (`textContent`), never as HTML. All addresses are relative: a proxy may serve the page below a path of its own.

import { Recordings, TranscriptView } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const FINAL = new Set(["completed", "error", "cancelled"]);
const ORDER = { processing: 0, queued: 1 };
const PAGE_JOBS = 100; // rows that are added at once
const UPLOADS_AT_ONCE = 2;
const RETRY_MS = 2000;
const KEEP_MS = 5000;
// Characters that change the direction of what follows them, or cannot be seen: a file name could pretend to be another.
const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;

export const plain = (text) => String(text ?? "").replace(INVISIBLE, "\u00b7");

// -- texts ------------------------------------------------------------------------------------------------------------

let texts = {};
let pageLanguage = "en";
let consumersDrawn = "";
let rejectedDrawn = null;

export function t(key, values = {}) {
  const text = Object.hasOwn(texts, key) ? texts[key] : key;
  return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const parts = [Math.floor(whole / 60) % 60, whole % 60].map((part) => String(part).padStart(2, "0"));
  return (whole >= 3600 ? `${Math.floor(whole / 3600)}:` : "") + parts.join(":");
}

export function moment(time) {
  const date = new Date(time);
  if (Number.isNaN(date.getTime())) return plain(time);
  return new Intl.DateTimeFormat(pageLanguage, { dateStyle: "medium", timeStyle: "short" }).format(date);
}

export function languageName(code) {
  try {
    return new Intl.DisplayNames(pageLanguage, { type: "language" }).of(code);
  } catch {
    return plain(code);
  }
}

async function loadLanguages() {
  const known = await (await fetch("languages.json")).json();
  let wanted = [...navigator.languages];
  try {
    wanted.unshift(localStorage.getItem("language"));
  } catch { /* storage is switched off */ }
  const short = wanted.filter(Boolean).map((tag) => tag.toLowerCase().split("-")[0]);
  $("page-language").append(...Object.entries(known).map(([code, name]) => make("option", { value: code }, name)));
  await setLanguage(short.find((code) => code in known) ?? "en");
}

async function setLanguage(code) {
  texts = await (await fetch(`languages/${code}.json`)).json();
  pageLanguage = code;
  document.documentElement.lang = code;
  $("page-language").value = code;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", t(element.dataset.label));
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = t(element.dataset.hint);
  rows.clear();
  $("jobs").replaceChildren();
  consumersDrawn = "";
  rejectedDrawn = null;
  fillOptions();
  showUploads();
  draw();
}

export function announce(text) {
  $("announcement").textContent = text;
}

// Changes a part of the page. The browser drops the focus of an element that is moved or replaced: it returns to the
// element, or goes to what stands for one that is gone.
function keepFocus(part, standIn, change) {
  const focused = part.contains(document.activeElement) ? document.activeElement : null;
  change();
  if (focused && document.activeElement !== focused) (focused.isConnected ? focused : standIn(focused)).focus({ preventScroll: true });
}

// -- requests ---------------------------------------------------------------------------------------------------------

export class Failure extends Error {
  constructor(status, problem) {
    super(plain(problem?.detail || problem?.title || t("upload_lost")));
    this.status = status;
  }
}

export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Failure(0, null);
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => null);
    if (response.status === 401) showLogin();
    throw new Failure(response.status, problem ?? { title: response.statusText });
  }
  return response;
}

async function act(path, method = "POST") {
  try {
    await request(path, { method });
    return true;
  } catch (failure) {
    const text = t("failed_action", { reason: failure.message });
    announce(text);
    await ask(text, null);
    return false;
  }
}

let answer = () => {};

// Asks a question; without a word for "yes" it is only a message. The event `close` of a dialog comes later, perhaps when the
// next question is already shown: it answers none.
export function ask(text, yes) {
  const dialog = $("question");
  answer(false);
  $("question-text").textContent = text;
  $("question-yes").textContent = yes ?? "";
  $("question-yes").hidden = yes === null;
  $("question-no").textContent = t(yes === null ? "close" : "keep");
  dialog.showModal();
  $("question-no").focus();
  return new Promise((done) => {
    answer = done;
  });
}

// -- what is known ----------------------------------------------------------------------------------------------------

const jobs = new Map();
const consumers = new Map();
let rejected = [];
let broker = { connected: true, problem: null };
let about = null;
const recordings = new Recordings();
const view = new TranscriptView(recordings, actOnJob);

function forget(isKnown) {
  recordings.keepOnly(isKnown);
  view.names.keepOnly(isKnown);
}

const nameOf = (job) => plain(job.file || job.audio_source || job.job_id);

function compare(a, b) {
  const one = ORDER[a.status] ?? 2, other = ORDER[b.status] ?? 2;
  if (one !== other) return one - other;
  if (one === 2) return (b.completed_at ?? "").localeCompare(a.completed_at ?? "") || b.job_id.localeCompare(a.job_id);
  return (b.priority ?? 0) - (a.priority ?? 0) || (a.queue_position ?? 1e9) - (b.queue_position ?? 1e9)
    || (a.created_at ?? "").localeCompare(b.created_at ?? "");
}

const handlers = {
  snapshot(data) {
    jobs.clear();
    consumers.clear();
    for (const job of data.jobs) jobs.set(job.job_id, job);
    for (const consumer of data.consumers) consumers.set(consumer.name, consumer);
    rejected = data.rejected;
    broker = data.broker;
    fillOptions();
    setTimeout(() => forget((id) => jobs.has(id)), KEEP_MS); // the newest jobs follow the snapshot
  },
  job(job) {
    const before = jobs.get(job.job_id);
    jobs.set(job.job_id, job);
    for (const upload of uploads.filter((one) => one.jobId === job.job_id && one.state === "sent")) dropUpload(upload);
    if (before && before.status !== job.status && FINAL.has(job.status)) {
      announce(t(job.status === "completed" ? "job_completed" : "job_failed", { name: nameOf(job) }));
      searchAgain();
    }
    view.update(job);
  },
  job_deleted({ job_id }) {
    jobs.delete(job_id);
    recordings.remove(job_id);
    view.names.keepOnly((id) => id !== job_id);
    view.remove(job_id);
  },
  consumer(consumer) {
    const before = consumers.get(consumer.name);
    consumers.set(consumer.name, consumer);
    if (String(before?.models) !== String(consumer.models)) fillOptions();
  },
  consumer_removed({ name }) {
    consumers.delete(name);
  },
  rejected(rejection) {
    rejected = [rejection, ...rejected].slice(0, 100);
    uploadRejected(rejection);
  },
  rejections(data) {
    rejected = data.rejected;
  },
  broker(state) {
    broker = state;
  },
};

// -- events -----------------------------------------------------------------------------------------------------------

let source = null;
let lastId = "";
let online = false;

function listen() {
  source?.close();
  source = new EventSource(lastId ? `api/events?last_event_id=${encodeURIComponent(lastId)}` : "api/events");
  for (const [kind, handle] of Object.entries(handlers)) {
    source.addEventListener(kind, (event) => {
      lastId = event.lastEventId;
      handle(JSON.parse(event.data));
      draw();
    });
  }
  source.addEventListener("open", () => {
    online = true;
    draw();
  });
  source.addEventListener("error", () => {
    online = false;
    draw();
    if (source.readyState === EventSource.CLOSED) setTimeout(begin, RETRY_MS);
  });
}

async function begin() {
  try {
    about = await (await request("api/about")).json();
  } catch (failure) {
    if (failure.status !== 401) setTimeout(begin, RETRY_MS);
    draw();
    return;
  }
  $("login").hidden = true;
  $("workplace").hidden = false;
  $("log-out").hidden = !about.has_session;
  view.formats = about.formats;
  fillOptions();
  listen();
}

// -- drawing ----------------------------------------------------------------------------------------------------------

let drawing = false;

// Many events that arrive together are drawn once.
function draw() {
  if (drawing || !texts._name) return; // without texts there is nothing to read yet
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    drawConnection();
    drawConsumers();
    keepFocus($("jobs"), standInRow, drawJobs);
    drawRejected();
  });
}

function drawConnection() {
  const where = $("connection");
  const fine = online && broker.connected;
  where.classList.toggle("lost", !fine && about !== null);
  let text = t(about === null ? "connecting" : "connected");
  if (about !== null && !online) text = t("page_lost");
  else if (about !== null && !broker.connected)
    text = broker.problem ? t("broker_lost", { problem: plain(broker.problem) }) : t("broker_lost_plain");
  if (where.textContent !== text) where.textContent = text;
}

function drawConsumers() {
  const list = [...consumers.values()].sort((a, b) => a.name.localeCompare(b.name));
  const text = JSON.stringify(list);
  if (text === consumersDrawn) return;
  consumersDrawn = text;
  const focused = document.activeElement?.closest("#consumers button")?.dataset.name;
  $("consumers").replaceChildren(...list.map((consumer) => {
    const queue = consumer.queue ?? {};
    const key = consumer.online ? `activity_${queue.activity ?? "idle"}` : "offline";
    const counts = t("consumer_counts", { queued: queue.queued ?? 0, completed: queue.completed_total ?? 0, errors: queue.error_total ?? 0 });
    const verb = queue.paused ? "resume" : "pause";
    const button = make("button", { type: "button", disabled: !consumer.online, "aria-label": t(`${verb}_named`, { name: consumer.name }) }, t(verb));
    Object.assign(button.dataset, { name: consumer.name, verb });
    return make("li", { className: "head" },
      make("bdi", { className: "name" }, plain(consumer.name)),
      make("span", { className: `state ${consumer.online ? queue.activity ?? "" : "offline"}` }, plain(t(key))),
      make("span", { className: "faint" }, counts), button);
  }));
  if (!list.length) $("consumers").append(make("li", { className: "faint" }, t("no_consumer")));
  if (focused) $("consumers").querySelector(`button[data-name="${CSS.escape(focused)}"]`)?.focus();
}

const rows = new Map();
let shown = PAGE_JOBS;
let found = null; // the jobs that the server found, each with a passage of its text; null: nothing is searched

function matches(job) {
  const filter = $("filter").value;
  if (filter === "open" && FINAL.has(job.status)) return false;
  if (filter === "completed" && job.status !== "completed") return false;
  if (filter === "failed" && job.status !== "error" && job.status !== "cancelled") return false;
  return found === null || found.has(job.job_id);
}

function drawJobs() {
  const all = [...jobs.values()].filter(matches).sort(compare);
  const visible = all.slice(0, shown);
  const list = $("jobs");
  const kept = new Set(visible.map((job) => job.job_id));
  for (const [id, row] of rows) {
    if (kept.has(id)) continue;
    row.element.remove();
    rows.delete(id);
  }
  let next = list.firstElementChild;
  for (const job of visible) {
    const row = rows.get(job.job_id) ?? newRow(job.job_id);
    const passage = found?.get(job.job_id) ?? "";
    if (row.job !== job || row.passage !== passage) fillRow(row, job, passage);
    if (row.element === next) next = next.nextElementSibling;
    else list.insertBefore(row.element, next);
  }
  $("more").hidden = all.length <= shown;
  $("counts").textContent = jobs.size ? t("counts", { shown: all.length, total: jobs.size }) : t("no_jobs");
}

function standInRow(button) {
  const row = rows.get(button.dataset.job);
  return row?.actions.querySelector(`[data-verb=${button.dataset.verb}]`) ?? row?.name ?? $("jobs-title");
}

function newRow(id) {
  const row = { element: make("li"), job: null, passage: "" };
  row.name = make("button", { type: "button", className: "name", dir: "auto" });
  row.state = make("span");
  row.facts = make("span", { className: "faint" });
  row.bar = make("progress", { max: 1 });
  row.text = make("p", { dir: "auto" });
  row.actions = make("div", { className: "actions" });
  Object.assign(row.name.dataset, { verb: "open", job: id });
  row.element.dataset.id = id;
  row.element.append(make("div", { className: "head" }, row.name, row.state, row.facts), row.bar, row.text, row.actions);
  rows.set(id, row);
  return row;
}

function fillRow(row, job, passage) {
  const name = nameOf(job);
  const changed = row.job?.status !== job.status || row.actions.dataset.name !== name;
  row.job = job;
  row.passage = passage;
  if (row.name.textContent !== name) row.name.textContent = name;
  row.state.className = `state ${job.status}`;
  row.state.textContent = t(`state_${job.status}`);
  row.facts.textContent = facts(job).join(" · ");
  row.bar.hidden = job.status !== "processing";
  if (!row.bar.hidden) {
    row.bar.value = job.diarization_progress ?? job.progress ?? 0;
    row.bar.setAttribute("aria-label", t("progress", { name }));
  }
  row.text.className = job.error_code ? "problem" : "excerpt";
  row.text.replaceChildren(...textOf(job, passage));
  row.text.hidden = !row.text.textContent;
  if (!changed) return;
  row.actions.dataset.name = name;
  row.actions.replaceChildren(...verbs(job).map((verb) => {
    const button = make("button", { type: "button", "aria-label": t(`${verb}_named`, { name }) }, t(verb));
    Object.assign(button.dataset, { verb, job: job.job_id });
    return button;
  }));
}

export function verbs(job) {
  if (job.status === "processing") return ["cancel"];
  if (job.status === "queued") return ["cancel", "delete"];
  return job.status === "completed" && !job.diarization_error ? ["delete"] : ["retry", "delete"];
}

function facts(job) {
  const list = [];
  if (job.status === "queued" && job.queue_position) list.push(t("position", { position: job.queue_position }));
  const percent = (share) => new Intl.NumberFormat(pageLanguage, { style: "percent" }).format(share);
  if (job.status === "processing" && job.diarization_progress != null) list.push(t("diarizing", { percent: percent(job.diarization_progress) }));
  else if (job.status === "processing" && job.progress != null) list.push(percent(job.progress));
  if (job.status === "processing" && job.eta != null) list.push(t("eta", { time: clock(job.eta) }));
  if (job.audio_duration != null) list.push(clock(job.audio_duration));
  if (job.detected_language) list.push(languageName(job.detected_language));
  if (job.created_at) list.push(moment(job.completed_at ?? job.created_at));
  return list;
}

function textOf(job, passage) {
  if (job.error_code) return [plain(job.error_message)];
  if (job.no_speech) return [t("no_speech")];
  const text = plain(passage || job.excerpt);
  const words = passage ? $("query").value.trim().split(/\s+/).filter(Boolean) : [];
  if (!words.length) return [text];
  const pattern = new RegExp(`(${words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "giu");
  return text.split(pattern).map((part, number) => (number % 2 ? make("mark", {}, part) : part));
}

function drawRejected() {
  $("rejected-count").textContent = rejected.length ? `(${rejected.length})` : "";
  if (!$("rejections").open || rejectedDrawn === rejected) return;
  rejectedDrawn = rejected;
  $("rejected").replaceChildren(...rejected.map((one) => make("li", {},
    make("div", { className: "head" }, make("bdi", { className: "name" }, plain(one.job_id ?? one.topic)),
      make("code", {}, plain(one.reason)), make("span", { className: "faint" }, moment(one.received_at))),
    make("p", { className: "problem", dir: "auto" }, plain(one.detail)))));
  if (!rejected.length) $("rejected").append(make("li", { className: "faint" }, t("no_rejections")));
}

// -- jobs -------------------------------------------------------------------------------------------------------------

export async function actOnJob(verb, id) {
  const job = jobs.get(id);
  if (!job) return;
  const name = nameOf(job);
  if (verb === "open") return view.open(job);
  if (verb === "delete") {
    if (await ask(t("ask_delete", { name }), t("delete")) && await act(`api/jobs/${id}`, "DELETE")) {
      view.close();
      announce(t("deleted", { name }));
      $("jobs-title").focus();
    }
    return;
  }
  if (verb === "cancel" && !(await ask(t("ask_cancel", { name }), t("cancel")))) return;
  await act(`api/jobs/${id}/${verb}`);
}

let searching = 0;

async function search() {
  const query = $("query").value.trim();
  const number = ++searching;
  if (!query) found = null;
  else {
    try {
      const answer = await (await request(`api/jobs?limit=1000&q=${encodeURIComponent(query)}`)).json();
      if (number !== searching) return;
      found = new Map(answer.jobs.map((job) => [job.job_id, job.passage ?? ""]));
    } catch {
      return;
    }
  }
  shown = PAGE_JOBS;
  draw();
}

let searchTimer = 0;

function searchSoon() {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(search, 200);
}

function searchAgain() {
  if (found !== null) searchSoon();
}

// -- options ----------------------------------------------------------------------------------------------------------

function options(select, entries) {
  const chosen = select.value;
  select.replaceChildren(...entries.map(([value, text]) => make("option", { value }, text)));
  select.value = entries.some(([value]) => value === chosen) ? chosen : "";
}

function fillOptions() {
  const form = document.querySelector("#options form").elements;
  const known = [...new Set([...consumers.values()].flatMap((consumer) => consumer.models ?? []))].sort();
  const usual = [...new Set([...consumers.values()].map((consumer) => consumer.default_model).filter(Boolean))];
  options(form.model_size, [["", usual.length === 1 ? t("model_default", { name: plain(usual[0]) }) : t("model_any")], ...known.map((name) => [name, plain(name)])]);
  const languages = (about?.languages ?? []).map((code) => [code, languageName(code)]);
  languages.sort((a, b) => a[1].localeCompare(b[1], pageLanguage));
  options(form.language, [["", t("detect")], ...languages]);
  options(form.priority, [["", t("priority_normal")], ...[1, 2, 3, 4, 5, 6, 7, 8, 9].map((level) => [String(level), String(level)])]);
  for (const element of document.querySelectorAll("#options [data-field]")) element.hidden = !about?.fields.includes(element.dataset.field);
  const chosen = new Set([...$("formats").querySelectorAll("input:checked")].map((box) => box.value));
  $("formats").replaceChildren(...(about?.formats ?? []).map((name) => {
    const fixed = name === "json"; // the times of the transcript come from it
    return make("label", {}, make("input", { type: "checkbox", value: name, checked: fixed || chosen.has(name), disabled: fixed }), ` ${name}`);
  }));
}

function fieldsOf() {
  const form = document.querySelector("#options form").elements;
  const fields = {};
  for (const name of ["model_size", "language", "task", "priority", "diarize", "min_speakers", "max_speakers", "initial_prompt"])
    if (!form[name].disabled && form[name].value.trim()) fields[name] = form[name].value.trim();
  fields.word_timestamps = String(form.word_timestamps.checked);
  fields.formats = [...$("formats").querySelectorAll("input:checked")].map((box) => box.value).join(",") || "json";
  return fields;
}

// -- uploads ----------------------------------------------------------------------------------------------------------

let uploads = [];

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return `page-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

function add(files) {
  const fields = fieldsOf();
  for (const file of files) {
    const fits = file.size <= about.max_upload_bytes;
    const reason = fits ? "" : t("too_large", { size: new Intl.NumberFormat(pageLanguage).format(Math.floor(about.max_upload_bytes / 1e6)) });
    uploads.push({ file, fields, jobId: newId(), state: fits ? "waiting" : "failed", share: 0, reason });
  }
  showUploads();
  sendNext();
}

function sendNext() {
  for (const upload of uploads.filter((one) => one.state === "waiting")) {
    if (uploads.filter((one) => one.state === "sending").length >= UPLOADS_AT_ONCE) return;
    send(upload);
  }
}

// XMLHttpRequest, because `fetch` does not report the progress of an upload.
function send(upload) {
  const form = new FormData();
  form.append("job_id", upload.jobId);
  for (const [name, value] of Object.entries(upload.fields)) form.append(name, value);
  form.append("file", upload.file, upload.file.name);
  const http = new XMLHttpRequest();
  const fail = (reason) => end(upload, "failed", reason);
  http.open("POST", "api/jobs");
  http.upload.addEventListener("progress", (event) => {
    upload.share = event.lengthComputable ? event.loaded / event.total : 0;
    showUpload(upload);
  });
  http.addEventListener("error", () => fail(t("upload_lost")));
  http.addEventListener("load", () => {
    if (http.status === 200 || http.status === 201 || http.status === 202) {
      recordings.keep(upload.jobId, upload.file);
      return jobs.has(upload.jobId) ? dropUpload(upload) : end(upload, "sent", "");
    }
    if (http.status === 401) showLogin();
    let problem = null;
    try {
      problem = JSON.parse(http.responseText);
    } catch { /* a proxy answered */ }
    fail(plain(problem?.detail || problem?.title || http.statusText || http.status));
  });
  upload.http = http;
  upload.state = "sending";
  showUpload(upload);
  http.send(form);
}

function end(upload, state, reason) {
  upload.state = state;
  upload.reason = reason;
  upload.http = null;
  showUpload(upload);
  if (state === "failed") announce(t("upload_failed", { reason }));
  sendNext();
}

function dropUpload(upload) {
  upload.http?.abort();
  uploads = uploads.filter((one) => one !== upload);
  keepFocus($("uploads"), () => $("files"), () => upload.element?.remove());
  sendNext();
}

function uploadRejected(rejection) {
  const upload = uploads.find((one) => one.jobId === rejection.job_id && one.state === "sent");
  if (upload) end(upload, "failed", plain(rejection.detail));
}

function showUploads() {
  $("uploads").replaceChildren();
  for (const upload of uploads) {
    upload.element = null;
    showUpload(upload);
  }
}

function showUpload(upload) {
  if (!uploads.includes(upload)) return;
  const name = plain(upload.file.name);
  if (!upload.element) {
    upload.element = make("li");
    $("uploads").append(upload.element);
  }
  const percent = new Intl.NumberFormat(pageLanguage, { style: "percent" }).format(upload.share);
  const text = { waiting: t("upload_waits"), sending: t("uploading", { percent }), sent: t("upload_sent"), failed: t("upload_failed", { reason: upload.reason }) }[upload.state];
  if (upload.element.dataset.state === upload.state) {
    upload.element.querySelector(".state").textContent = text;
    const bar = upload.element.querySelector("progress");
    if (bar) bar.value = upload.share;
    return;
  }
  upload.element.dataset.state = upload.state;
  keepFocus($("uploads"), () => upload.element.querySelector("button"), () => fillUpload(upload, name, text));
}

function fillUpload(upload, name, text) {
  upload.element.replaceChildren(make("div", { className: "head" },
    make("bdi", { className: "name" }, name), make("span", { className: `state ${upload.state === "failed" ? "error" : ""}` }, text)));
  if (upload.state === "sending")
    upload.element.append(make("progress", { max: 1, value: upload.share, "aria-label": t("progress", { name }) }));
  const buttons = upload.state === "failed" ? ["again", "dismiss"] : ["stop"];
  upload.element.append(make("div", { className: "actions" }, ...buttons.map((verb) => {
    const button = make("button", { type: "button" }, t(verb));
    button.addEventListener("click", () => {
      if (verb !== "again") return dropUpload(upload);
      upload.state = "waiting";
      upload.share = 0;
      showUpload(upload);
      sendNext();
    });
    return button;
  })));
}

// -- the microphone ---------------------------------------------------------------------------------------------------

let recorder = null;

async function record() {
  if (recorder) return recorder.stop();
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    recorder = new MediaRecorder(stream);
  } catch (failure) {
    stream?.getTracks().forEach((track) => track.stop());
    await ask(t("record_failed", { reason: plain(failure.message) }), null);
    return;
  }
  const parts = [];
  const started = Date.now();
  const timer = setInterval(() => { $("record-time").textContent = clock((Date.now() - started) / 1000); }, 500);
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  recorder.addEventListener("stop", () => {
    clearInterval(timer);
    stream.getTracks().forEach((track) => track.stop());
    const type = recorder.mimeType || "audio/webm";
    recorder = null;
    $("record-time").textContent = "";
    $("record").textContent = t("record");
    $("record").classList.remove("on");
    const ending = type.includes("mp4") ? "m4a" : type.includes("ogg") ? "ogg" : "webm";
    add([new File(parts, `${t("recording_name", { time: moment(started) })}.${ending}`, { type })]);
  });
  recorder.start(1000);
  $("record").textContent = t("record_stop");
  $("record").classList.add("on");
}

// -- logging in -------------------------------------------------------------------------------------------------------

function showLogin() {
  source?.close();
  online = false;
  about = null;
  $("workplace").hidden = true;
  $("log-out").hidden = true;
  if (!$("login").hidden) return;
  $("login").hidden = false;
  $("password").focus();
}

async function logIn(event) {
  event.preventDefault();
  $("login-problem").textContent = "";
  const body = JSON.stringify({ password: $("password").value });
  const response = await fetch("login", { method: "POST", headers: { "Content-Type": "application/json" }, body }).catch(() => null);
  if (response?.ok) {
    $("password").value = "";
    return begin();
  }
  const problem = await response?.json().catch(() => null);
  $("login-problem").textContent = plain(problem?.detail || t("upload_lost"));
  $("password").select();
}

// -- start ------------------------------------------------------------------------------------------------------------

function connect() {
  $("page-language").addEventListener("change", (event) => {
    try {
      localStorage.setItem("language", event.target.value);
    } catch { /* storage is switched off */ }
    setLanguage(event.target.value);
  });
  $("login-form").addEventListener("submit", logIn);
  $("log-out").addEventListener("click", async () => {
    await fetch("logout", { method: "POST" }).catch(() => null);
    showLogin();
  });
  $("files").addEventListener("change", (event) => {
    add([...event.target.files]);
    event.target.value = "";
  });
  $("record").hidden = !(navigator.mediaDevices?.getUserMedia && window.MediaRecorder);
  $("record").addEventListener("click", record);
  const drop = $("drop");
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
  document.addEventListener("dragover", () => drop.classList.add("over"));
  document.addEventListener("dragleave", (event) => event.relatedTarget || drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    drop.classList.remove("over");
    if (!$("workplace").hidden && event.dataTransfer?.files.length) add([...event.dataTransfer.files]);
  });
  $("consumers").addEventListener("click", (event) => {
    const { name, verb } = event.target.closest("button")?.dataset ?? {};
    if (name) act(`api/consumers/${encodeURIComponent(name)}/${verb}`);
  });
  $("jobs").addEventListener("click", (event) => {
    const verb = event.target.closest("button")?.dataset.verb;
    if (verb) actOnJob(verb, event.target.closest("li").dataset.id);
  });
  $("search").addEventListener("submit", (event) => event.preventDefault());
  $("query").addEventListener("input", searchSoon);
  $("filter").addEventListener("change", () => {
    shown = PAGE_JOBS;
    draw();
  });
  const more = () => {
    shown += PAGE_JOBS;
    draw();
  };
  $("more").addEventListener("click", more);
  new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && more(), { rootMargin: "400px" }).observe($("more"));
  $("rejections").addEventListener("toggle", draw);
  for (const dialog of [$("detail"), $("question")]) {
    dialog.addEventListener("close", () => { // what had the focus before may be gone
      if (document.activeElement === document.body) $($("detail").open ? "detail-close" : "jobs-title").focus();
    });
  }
  for (const [button, isYes] of [["question-yes", true], ["question-no", false]]) {
    $(button).addEventListener("click", () => {
      answer(isYes);
      $("question").close();
    });
  }
  $("question").addEventListener("close", () => $("question").open || answer(false)); // by Escape
  const form = document.querySelector("#options form");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.diarize.addEventListener("change", (event) => {
    for (const name of ["min_speakers", "max_speakers"]) form.elements[name].disabled = event.target.value !== "true";
  });
}

connect();
begin();
loadLanguages();

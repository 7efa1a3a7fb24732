// One job in full: its facts, its transcript with times, words and speakers, and a player for recordings that this
// browser has uploaded, which it keeps in its own database.

import { announce, clock, languageName, make, moment, plain, request, t, verbs } from "./page.js";
import { SpeakerNames, colour, withNames } from "./speakers.js";

const $ = (id) => document.getElementById(id);
const MOST_WORDS = 30000; // beyond it only segments can be clicked: each word is an element
const MOST_RECORDINGS = 30;
const MOST_SPEAKERS = 40; // that can be named: a consumer distinguishes 20

// -- recordings of this browser ---------------------------------------------------------------------------------------

export class Recordings {
  constructor() {
    this.files = new Map();
    this.database = new Promise((done) => {
      try {
        const opening = indexedDB.open("cesar-mqtt", 1);
        opening.onupgradeneeded = () => opening.result.createObjectStore("recordings");
        opening.onsuccess = () => done(opening.result);
        opening.onerror = () => done(null);
      } catch {
        done(null); // storage is switched off
      }
    });
  }

  async run(mode, work) {
    const database = await this.database;
    if (!database) return undefined;
    return new Promise((done) => {
      const transaction = database.transaction("recordings", mode);
      const asked = work(transaction.objectStore("recordings"));
      transaction.oncomplete = () => done(asked.result);
      transaction.onerror = transaction.onabort = () => done(undefined); // such as: the quota is used up
    });
  }

  async keep(id, file) {
    this.files.set(id, file);
    await this.run("readwrite", (store) => store.put({ file, at: Date.now() }, id));
    const ids = (await this.run("readonly", (store) => store.getAllKeys())) ?? [];
    if (ids.length > MOST_RECORDINGS) {
      const entries = (await this.run("readonly", (store) => store.getAll())) ?? [];
      const oldest = ids.map((key, number) => [entries[number]?.at ?? 0, key]).sort((a, b) => a[0] - b[0]);
      for (const [, key] of oldest.slice(0, ids.length - MOST_RECORDINGS)) this.remove(key);
    }
  }

  async get(id) {
    return this.files.get(id) ?? (await this.run("readonly", (store) => store.get(id)))?.file;
  }

  remove(id) {
    this.files.delete(id);
    return this.run("readwrite", (store) => store.delete(id));
  }

  async keepOnly(isKnown) {
    const ids = (await this.run("readonly", (store) => store.getAllKeys())) ?? [];
    for (const id of ids) if (!isKnown(id) && !this.files.has(id)) this.remove(id);
  }
}

// -- one job ----------------------------------------------------------------------------------------------------------

export class TranscriptView {
  constructor(recordings, act) {
    this.recordings = recordings;
    this.act = act;
    this.job = null;
    this.formats = ["txt"];
    this.names = new SpeakerNames();
    this.segments = [];
    this.speakers = []; // their labels, in the order in which they are heard first
    this.spans = []; // what can be played: {element, start, end}, in order of time
    this.now = -1; // the span that plays
    this.stop = -1; // the span that Tab reaches: a long transcript is one tab stop, in which the arrow keys move
    this.isFollowing = true; // the view scrolls along with what plays
    this.dialog = $("detail");
    this.player = $("player");
    $("detail-close").addEventListener("click", () => this.close());
    this.dialog.addEventListener("close", () => this.clear());
    this.player.addEventListener("timeupdate", () => this.follow());
    for (const kind of ["play", "seeked"]) {
      this.player.addEventListener(kind, () => {
        this.isFollowing = true;
        this.followEachFrame();
      });
    }
    $("transcript").addEventListener("click", (event) => this.clicked(event));
    $("transcript").addEventListener("keydown", (event) => this.pressed(event));
    $("detail-tools").addEventListener("click", (event) => this.tool(event));
    $("speakers").addEventListener("change", (event) => this.rename(event.target));
  }

  open(job) {
    this.clear();
    this.job = job;
    this.dialog.showModal();
    $("detail-close").focus();
    this.show(job);
    this.load(job);
  }

  close() {
    if (this.dialog.open) this.dialog.close();
  }

  clear() {
    this.job = null;
    this.spans = [];
    this.now = this.stop = -1;
    this.isFollowing = true;
    this.showSpeakers([]);
    this.player.pause();
    if (this.player.src) URL.revokeObjectURL(this.player.src);
    this.player.removeAttribute("src");
    this.player.hidden = $("player-hint").hidden = true;
    $("transcript").replaceChildren();
    $("transcript").classList.remove("playable");
    $("transcript").tabIndex = 0;
  }

  update(job) {
    if (this.job?.job_id !== job.job_id) return;
    const ended = this.job.status !== job.status;
    this.job = job;
    this.show(job);
    if (ended) this.load(job);
  }

  remove(id) {
    if (this.job?.job_id === id) this.close();
  }

  show(job) {
    $("detail-title").textContent = plain(job.file || job.audio_source || job.job_id);
    const state = $("detail-state");
    state.className = job.error_code ? "problem" : `state ${job.status}`;
    state.dir = "auto";
    state.textContent = job.error_code ? plain(job.error_message) : t(`state_${job.status}`);
    const facts = [
      ["fact_job", job.job_id], ["fact_created", job.created_at && moment(job.created_at)],
      ["fact_ended", job.completed_at && moment(job.completed_at)], ["fact_duration", job.audio_duration != null && clock(job.audio_duration)],
      ["fact_language", job.detected_language && languageName(job.detected_language)], ["fact_model", job.model_size],
      ["fact_speakers", job.speakers], ["fact_consumer", job.consumer], ["fact_source", job.audio_source?.startsWith("upload") ? null : job.audio_source],
      ["fact_attempt", job.attempt > 1 && job.attempt], ["fact_warnings", (job.warnings ?? []).map(warningText).join(", ")],
      ["fact_diarization", job.diarization_error],
    ];
    $("detail-facts").replaceChildren(...facts.filter(([, value]) => value).flatMap(([key, value]) =>
      [make("dt", {}, t(key)), make("dd", { dir: "auto" }, plain(value))]));
    const tools = [];
    if (job.status === "completed") {
      tools.push(this.button("copy", t("copy")));
      const times = (job.formats ?? []).length > 0; // else the consumer has kept no times
      for (const format of times ? this.formats : ["txt"])
        tools.push(make("a", { className: "button", href: `api/jobs/${job.job_id}/result.${format}`, download: "", "data-format": format, "aria-label": t("download", { format }) }, format));
    }
    tools.push(...verbs(job).map((verb) => this.button(verb, t(verb))));
    if (JSON.stringify(tools.map((tool) => tool.outerHTML)) === this.tools && $("detail-tools").childElementCount) return;
    this.tools = JSON.stringify(tools.map((tool) => tool.outerHTML));
    const hadFocus = $("detail-tools").contains(document.activeElement);
    $("detail-tools").replaceChildren(...tools);
    if (hadFocus) $("detail-close").focus();
  }

  button(verb, text) {
    const button = make("button", { type: "button" }, text);
    button.dataset.verb = verb;
    return button;
  }

  async tool(event) {
    const link = event.target.closest("a");
    if (link && this.job && this.names.of(this.job.job_id).size) {
      event.preventDefault();
      return this.download(this.job, link);
    }
    const verb = event.target.closest("button")?.dataset.verb;
    if (!verb || !this.job) return;
    if (verb !== "copy") return this.act(verb, this.job.job_id);
    await copy(this.speakers.length ? this.turns() : this.text ?? "");
    announce(t("copied"));
  }

  // Downloads a transcript with the names of its speakers.
  async download(job, link) {
    const { format } = link.dataset;
    try {
      const text = await (await request(link.getAttribute("href"))).text();
      const file = new Blob([withNames(format, text, this.names.of(job.job_id))], { type: "text/plain" });
      const href = URL.createObjectURL(file);
      make("a", { href, download: `${job.job_id}.${format}` }).click();
      setTimeout(() => URL.revokeObjectURL(href), 60000);
    } catch (failure) {
      announce(t("transcript_failed", { reason: failure.message }));
    }
  }

  // -- speakers -------------------------------------------------------------------------------------------------------

  nameOf(speaker, names = this.names.of(this.job.job_id)) {
    return plain(names.get(speaker) ?? speaker);
  }

  showSpeakers(segments) {
    this.segments = segments;
    this.speakers = [...new Set(segments.map(speakerOf).filter(Boolean))];
    $("speakers").hidden = !this.speakers.length;
    $("speaker-names").replaceChildren(...this.speakers.slice(0, MOST_SPEAKERS).map((speaker, number) => {
      const input = make("input", { type: "text", maxLength: 80, value: this.names.of(this.job.job_id).get(speaker) ?? "", placeholder: plain(speaker), "aria-label": t("name_of", { speaker: plain(speaker) }) });
      input.dataset.voice = number;
      return colour(make("label", {}, make("span", { dir: "auto" }, plain(speaker)), input), number);
    }));
  }

  rename(input) {
    const speaker = this.speakers[input.dataset.voice];
    this.names.give(this.job.job_id, speaker, plain(input.value.trim()));
    for (const element of $("transcript").querySelectorAll(".speaker"))
      if (element.dataset.voice === input.dataset.voice) element.textContent = this.nameOf(speaker);
    announce(t("renamed", { speaker: plain(speaker), name: this.nameOf(speaker) }));
  }

  // The text to be copied: a line for each turn.
  turns() {
    const turns = [], names = this.names.of(this.job.job_id);
    for (const segment of this.segments) {
      const speaker = speakerOf(segment), text = String(segment.text ?? "").trim();
      if (turns.length && turns.at(-1).speaker === speaker) turns.at(-1).text += ` ${text}`;
      else turns.push({ speaker, text });
    }
    return turns.map(({ speaker, text }) => (speaker ? `${this.nameOf(speaker, names)}: ${text}` : text)).join("\n");
  }

  async load(job) {
    const where = $("transcript");
    this.text = "";
    this.showSpeakers([]);
    if (job.status !== "completed") {
      if (job.status === "queued" || job.status === "processing") where.textContent = t("transcript_waits");
      else where.replaceChildren();
      return;
    }
    try {
      const status = await (await request(`api/jobs/${job.job_id}`)).json();
      let segments = null;
      if ((job.formats ?? []).length) segments = (await (await request(`api/jobs/${job.job_id}/result.json`)).json()).segments;
      if (this.job?.job_id !== job.job_id) return;
      this.text = status.result_text ?? "";
      this.showTranscript(segments, status);
    } catch (failure) {
      if (this.job?.job_id === job.job_id) where.textContent = t("transcript_failed", { reason: failure.message });
      return;
    }
    const file = await this.recordings.get(job.job_id);
    if (!file || this.job?.job_id !== job.job_id) return;
    this.player.src = URL.createObjectURL(file);
    this.player.hidden = $("player-hint").hidden = false;
    $("player-hint").textContent = t("player_hint");
    where.classList.add("playable");
    for (const time of where.querySelectorAll(".time")) time.disabled = false;
    if (!this.spans.length) return;
    const hadFocus = document.activeElement === where;
    where.removeAttribute("tabindex");
    this.moveStop(0);
    if (hadFocus) this.spans[0].element.focus();
  }

  showTranscript(segments, status) {
    const where = $("transcript");
    this.spans = [];
    if (status.no_speech) where.textContent = t("no_speech");
    else if (!segments) where.replaceChildren(make("p", { dir: "auto" }, plainLines(this.text)));
    else {
      const each = segments.reduce((count, segment) => count + (segment.words?.length ?? 0), 0) <= MOST_WORDS;
      const names = this.names.of(status.job_id);
      let before = null;
      this.showSpeakers(segments);
      where.replaceChildren(...segments.map((segment) => {
        const line = make("p", { dir: "auto" });
        const time = make("button", { type: "button", className: "time", tabIndex: -1, disabled: true, "aria-label": t("play_from", { time: clock(segment.start) }) }, clock(segment.start));
        time.dataset.start = segment.start;
        line.append(time);
        const speaker = speakerOf(segment);
        if (speaker) {
          const number = this.speakers.indexOf(speaker);
          colour(line, number);
          if (speaker !== before) line.append(make("span", { className: "speaker", "data-voice": number }, this.nameOf(speaker, names)));
        }
        before = speaker;
        if (each && segment.words?.length) for (const word of segment.words) line.append(this.span("word", word.word, word));
        else line.append(this.span("text", segment.text, segment));
        return line;
      }));
    }
    if (status.result_truncated) where.append(make("p", { className: "faint" }, t("transcript_cut")));
  }

  span(kind, text, { start, end }) {
    const element = make("span", { className: kind }, plainLines(text));
    element.dataset.number = this.spans.length;
    this.spans.push({ element, start, end });
    return element;
  }

  // -- playing --------------------------------------------------------------------------------------------------------

  clicked(event) {
    const { number, start } = event.target.dataset;
    if (this.player.hidden) return;
    if (number !== undefined) {
      this.moveStop(Number(number));
      this.spans[number].element.focus({ preventScroll: true });
      this.play(this.spans[number].start);
    } else if (start !== undefined) this.play(Number(start));
  }

  play(seconds) {
    this.player.currentTime = seconds;
    this.player.play().catch(() => {}); // the browser may not be able to play what the consumer can
  }

  pressed(event) {
    const number = Number(event.target.dataset.number);
    if (this.player.hidden || Number.isNaN(number) || event.ctrlKey || event.altKey || event.metaKey) return;
    const last = this.spans.length - 1;
    const to = {
      ArrowRight: () => number + 1, ArrowLeft: () => number - 1, Home: () => 0, End: () => last,
      ArrowDown: () => this.numberOf(event.target.parentElement.nextElementSibling),
      ArrowUp: () => this.numberOf(event.target.parentElement.previousElementSibling),
    }[event.key]?.() ?? NaN;
    if (to >= 0 && to <= last) {
      this.isFollowing = false;
      this.moveStop(to);
      this.spans[to].element.focus();
    } else if (event.key === "Enter") this.play(this.spans[number].start);
    else if (event.key === " ") this.player.paused ? this.player.play().catch(() => {}) : this.player.pause();
    else if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
  }

  // The first span of a line.
  numberOf(line) {
    return Number(line?.querySelector("[data-number]")?.dataset.number ?? NaN);
  }

  moveStop(number) {
    if (this.stop >= 0) this.spans[this.stop].element.tabIndex = -1;
    this.stop = number;
    this.spans[number].element.tabIndex = 0;
  }

  followEachFrame() {
    this.follow();
    if (!this.player.paused && this.job) requestAnimationFrame(() => this.followEachFrame());
  }

  follow() {
    const at = this.player.currentTime + 0.02;
    let low = 0, high = this.spans.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.spans[middle].start <= at) low = middle + 1;
      else high = middle;
    }
    if (low > 0 && !(this.player.paused && at < 0.1)) this.mark(low - 1);
  }

  mark(number) {
    if (number === this.now) return;
    this.spans[this.now]?.element.classList.remove("now");
    this.now = number;
    const { element } = this.spans[number];
    element.classList.add("now");
    if (!$("transcript").contains(document.activeElement)) this.moveStop(number);
    if (this.isFollowing) element.scrollIntoView({ block: "nearest" });
  }
}

// A consumer of a later version may warn of something that this page has no words for.
function warningText(code) {
  const text = t(`warning_${code}`);
  return text === `warning_${code}` ? String(code) : text;
}

function speakerOf(segment) {
  return typeof segment.speaker === "string" ? segment.speaker : null;
}

function plainLines(text) {
  return String(text ?? "").split("\n").map(plain).join("\n");
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // only on pages over https, and on this machine
    const area = make("textarea", { value: text, readOnly: true });
    $("detail").append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

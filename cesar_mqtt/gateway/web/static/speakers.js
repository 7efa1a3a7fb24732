// The speakers of a transcript: a colour for each, and the names that this browser gives them in the view and in downloads.

const STORED = "speakers";
const MOST_JOBS = 200; // whose names are kept, the newest ones
const TURN = 137.5; // degrees: hues of neighbours differ, however many there are

// -- names ------------------------------------------------------------------------------------------------------------

// By job, each a map from the label to the name. Other tabs write as well: it is read anew for each change.
export class SpeakerNames {
  constructor() {
    this.jobs = new Map();
  }

  read() {
    try {
      this.jobs = new Map(JSON.parse(localStorage.getItem(STORED) ?? "[]").map(([id, names]) => [id, new Map(names)]));
    } catch { /* storage is switched off, or another page has written there */ }
    return this.jobs;
  }

  write() {
    const newest = [...this.jobs].slice(-MOST_JOBS);
    this.jobs = new Map(newest);
    try {
      localStorage.setItem(STORED, JSON.stringify(newest.map(([id, names]) => [id, [...names]])));
    } catch { /* they last as long as the page */ }
  }

  of(id) {
    return this.read().get(id) ?? new Map();
  }

  // An empty name, and the label itself, take the name back.
  give(id, label, name) {
    const names = this.of(id);
    this.jobs.delete(id);
    if (name && name !== label) names.set(label, name);
    else names.delete(label);
    if (names.size) this.jobs.set(id, names);
    this.write();
  }

  keepOnly(isKnown) {
    const gone = [...this.read().keys()].filter((id) => !isKnown(id));
    for (const id of gone) this.jobs.delete(id);
    if (gone.length) this.write();
  }
}

// -- colours ----------------------------------------------------------------------------------------------------------

// The style sheet makes colours of the hue that can be read on light and dark paper.
export function colour(element, number) {
  element.classList.add("voice");
  element.style.setProperty("--hue", String((20 + number * TURN) % 360));
  return element;
}

// -- files ------------------------------------------------------------------------------------------------------------

const VTT = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };
const oneLine = (name) => name.split(/[\u0000-\u001f\u007f-\u009f\u2028\u2029]+/).map((part) => part.trim()).join(" ").trim();

// How the consumer writes a speaker in each format, and where: what stands before, and what follows.
const WRITTEN = {
  txt: { form: oneLine, before: "^", after: ": " },
  srt: { form: (name) => oneLine(name).replace(/-{2,}>/g, "->"), before: " --> [^\\n]*\\n", after: ": " },
  vtt: { form: (name) => oneLine(name).replace(/[&<>]/g, (sign) => VTT[sign]), before: "^<v ", after: ">" },
  md: {
    form: (name) => oneLine(name).replace(/[\\`*_[\]<>#|~&]|^[-+=](?=\s|$)|^:?-{2}/g, "\\$&").replace(/^(\d{1,9})([.)])(?=\s|$)/, "$1\\$2"),
    before: "^## ", after: ", (?=[\\d:]+$)",
  },
};

// Returns a downloaded transcript with the names instead of the labels.
export function withNames(format, text, names) {
  if (!names.size) return text;
  if (format === "json") return `${JSON.stringify(JSON.parse(text), (key, value) => (key === "speaker" ? names.get(value) ?? value : value))}\n`;
  if (!Object.hasOwn(WRITTEN, format)) return text; // tsv has no speakers
  const { form, before, after } = WRITTEN[format];
  const written = new Map([...names].map(([label, name]) => [form(label), form(name)]));
  const labels = [...written.keys()].map((label) => label.replace(/[.*+?^${}()|[\]\\/-]/g, "\\$&"));
  return text.replace(new RegExp(`(${before})(${labels.join("|")})(?=${after})`, "gm"), (_, lead, label) => lead + written.get(label));
}

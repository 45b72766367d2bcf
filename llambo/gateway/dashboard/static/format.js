// Numbers and times for people.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const hours = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const full = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

export const number = (value) => (Math.abs(value) < 9.95 ? fine : whole).format(value);
export const count = (value) => whole.format(value);
export const clock = (ms) => hours.format(ms);
export const moment = (ms) => full.format(ms);
export const many = (value, one, more = `${one}s`) => `${count(value)} ${value === 1 ? one : more}`;

/** With two units at most. */
export function duration(ms) {
  const s = Math.max(0, ms) / 1000;
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 10) return `${fine.format(s)} s`;
  if (s < 60) return `${Math.floor(s)} s`;
  const [days, h, m] = [Math.floor(s / 86400), Math.floor((s % 86400) / 3600), Math.floor((s % 3600) / 60)];
  if (days) return h ? `${days} d ${h} h` : `${days} d`;
  if (h) return m ? `${h} h ${m} min` : `${h} h`;
  return `${m} min`;
}

/** Value and unit separately, for a large figure. */
export function figure(ms) {
  if (ms < 1000) return [whole.format(ms), "ms"];
  if (ms < 60_000) return [fine.format(ms / 1000), "s"];
  return [fine.format(ms / 60_000), "min"];
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB"];
  while (value >= 1024 && units.length > 1) {
    value /= 1024;
    units.shift();
  }
  return `${number(value)} ${units[0]}`;
}

export const shortId = (id) => id.slice(0, 8);

/** So that worker-10 comes after worker-9. */
export const natural = new Intl.Collator("en", { numeric: true }).compare;

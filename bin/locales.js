// Prints, as JSON, what the helpers `date` and `number` need of each locale: CLDR's names of months
// and days and its decimal format, moment's ordinals and parts of the day. Called by bin/vendor
// with the unpacked packages moment, cldr-dates-full and cldr-numbers-full.
"use strict";
const path = require("node:path");
const [momentFolder, datesFolder, numbersFolder] = process.argv
  .slice(2)
  .map((folder) => path.resolve(folder));
const moment = require(path.join(momentFolder, "moment.js"));

const SAME = "bg ca cs da de el es et fi fr hr hu id it ja ko lt lv nb nl pl ro ru sk sl sv tr uk vi";
const LOCALES = { // our name: [moment's, CLDR's]
  en: ["en", "en"],
  ...Object.fromEntries(SAME.split(" ").map((name) => [name, [name, name]])),
  nb: ["nb", "no"],
  pt: ["pt", "pt-PT"],
  "pt-br": ["pt-br", "pt"],
  zh: ["zh-cn", "zh"],
  "zh-tw": ["zh-tw", "zh-Hant"],
};

function range(length, make) {
  return Array.from({ length }, (_, n) => make(n));
}

function names(name) {
  const file = path.join(datesFolder, "main", name, "ca-gregorian.json");
  const { months, days } = require(file).main[name].dates.calendars.gregorian;
  const inWeek = (names) => ["mon", "tue", "wed", "thu", "fri", "sat", "sun"].map((d) => names[d]);
  return {
    months: Object.values(months["stand-alone"].wide),
    monthsAfterDay: Object.values(months.format.wide),
    shortMonths: Object.values(months["stand-alone"].abbreviated),
    shortMonthsAfterDay: Object.values(months.format.abbreviated),
    days: inWeek(days["stand-alone"].wide),
    shortDays: inWeek(days["stand-alone"].abbreviated),
  };
}

function ordinals(name) {
  if (name !== "en") require(path.join(momentFolder, "locale", name));
  const data = moment.localeData(name);
  const meridiem = []; // [from this minute of the day on, A, a]
  for (let minute = 0; minute < 1440; minute += 30) {
    const at = [Math.floor(minute / 60), minute % 60];
    const texts = [data.meridiem(...at, false), data.meridiem(...at, true)];
    const last = meridiem.at(-1);
    if (!last || last[1] !== texts[0] || last[2] !== texts[1]) meridiem.push([minute, ...texts]);
  }
  return { ordinals: range(31, (n) => String(data.ordinal(n + 1, "D"))), meridiem };
}

function numbers(name) {
  const { numbers } = require(path.join(numbersFolder, "main", name, "numbers.json")).main[name];
  const symbols = numbers["symbols-numberSystem-latn"];
  const groups = numbers["decimalFormats-numberSystem-latn"].standard.split(".")[0].split(",");
  return {
    decimal: symbols.decimal,
    group: symbols.group,
    minus: symbols.minusSign,
    groupSize: groups.at(-1).length,
    leastBeforeGroup: Number(numbers.minimumGroupingDigits),
  };
}

const table = {};
for (const [name, [ofMoment, ofCldr]] of Object.entries(LOCALES)) {
  table[name] = { ...names(ofCldr), ...ordinals(ofMoment), ...numbers(ofCldr) };
}
process.stdout.write(`${JSON.stringify(table)}\n`);

// Runs in a new context before lodash and handlebars. It removes everything whose results may differ,
// and limits the few native functions that loop without checking the limits.
//
// QuickJS checks the limit of time once in 10,000 calls and passes of loops. A native function is one
// call, however much it reads: so what reads much passes through `charge` as well.
"use strict";
(() => {
  for (const name of [
    "Atomics", "FinalizationRegistry", "SharedArrayBuffer", "WeakRef", "performance",
    "queueMicrotask",
  ]) {
    delete globalThis[name];
  }
  globalThis.Date = class Date {
    static now() {
      return NaN;
    }
  };
  Math.random = () => 0.5;
  delete String.raw; // it loops as often as its argument says, and paths of conditions reach it

  // One pass for so many elements or characters that a native function reads in a microsecond or a few.
  const READ_IN_A_PASS = 64;
  function charge(length) {
    for (let left = length; left > READ_IN_A_PASS; left -= READ_IN_A_PASS);
  }
  globalThis.charge = charge; // until evaluate.js takes it

  // With `{"length": 1e15}`, these would not return, and no limit would stop them.
  const LONGEST = 1e6;
  for (const name of [
    "concat", "copyWithin", "fill", "flat", "includes", "indexOf", "join", "lastIndexOf", "reverse",
    "shift", "slice", "sort", "splice", "toLocaleString", "toReversed", "toSorted", "toSpliced",
    "unshift", "with",
  ]) {
    const native = Array.prototype[name];
    const bounded = {
      [name](...args) {
        if (!Array.isArray(this) && this?.length > LONGEST) {
          throw new RangeError("Invalid array length");
        }
        charge(name === "splice" ? this?.length - args[0] : this?.length);
        return Reflect.apply(native, this, args);
      },
    }[name];
    Object.defineProperty(bounded, "length", { value: native.length });
    Object.defineProperty(Array.prototype, name, { value: bounded });
  }

  // At each place of a text, these may compare all of the other text: for 500,000 characters and
  // 250,000, more than a minute. Then each character is read once, in a loop that can be stopped.
  const MOST_COMPARED = 1e8;

  // The places of a text in another one, by Knuth, Morris and Pratt.
  function* places(text, wanted, from) {
    const shorter = [0]; // for each beginning of `wanted`: how much of its end is a beginning as well
    for (let at = 1, same = 0; at < wanted.length; at++) {
      while (same > 0 && wanted[at] !== wanted[same]) same = shorter[same - 1];
      if (wanted[at] === wanted[same]) same++;
      shorter.push(same);
    }
    for (let at = from, same = 0; at < text.length; at++) {
      while (same > 0 && text[at] !== wanted[same]) same = shorter[same - 1];
      if (text[at] === wanted[same]) same++;
      if (same < wanted.length) continue;
      yield at - same + 1;
      same = shorter[same - 1];
    }
  }

  const SEARCHES = {
    indexOf(text, wanted, from = 0) {
      for (const place of places(text, wanted, Math.max(0, Math.trunc(from) || 0))) return place;
      return -1;
    },
    lastIndexOf(text, wanted) {
      let last = -1;
      for (const place of places(text, wanted, 0)) last = place;
      return last;
    },
    split(text, separator) {
      const parts = [];
      let begin = 0;
      for (const place of places(text, separator, 0)) {
        if (place < begin) continue;
        parts.push(text.slice(begin, place));
        begin = place + separator.length;
      }
      parts.push(text.slice(begin));
      return parts;
    },
  };
  for (const [name, search] of Object.entries(SEARCHES)) {
    const native = String.prototype[name];
    const bounded = {
      [name](wanted, other) {
        if (typeof wanted === "string" && wanted.length * this.length > MOST_COMPARED) {
          return search(String(this), wanted, other);
        }
        return native.call(this, wanted, other);
      },
    }[name];
    Object.defineProperty(bounded, "length", { value: native.length });
    Object.defineProperty(String.prototype, name, { value: bounded });
  }
})();

// Runs in a new context before lodash and handlebars. It removes everything whose results may differ,
// and limits the few native functions that loop without checking the limits.
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
        return Reflect.apply(native, this, args);
      },
    }[name];
    Object.defineProperty(bounded, "length", { value: native.length });
    Object.defineProperty(Array.prototype, name, { value: bounded });
  }
})();

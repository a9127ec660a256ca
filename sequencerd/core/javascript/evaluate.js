// Runs in a new context after lodash and handlebars. Its value is a function that takes the table of
// locales and returns what sandbox.py calls. Texts that may hold any character are passed as JSON.
"use strict";
(localesText) => {
  const { _, Handlebars, charge } = globalThis;
  const { parse, stringify } = JSON;
  const compile = globalThis.eval; // of code that handlebars wrote
  delete globalThis._;
  delete globalThis.Handlebars;
  delete globalThis.charge;

  // --- conditions

  const PLAIN_PATH = /^\w+(\.\w+)+$/;
  const ONLY_READS = /^(eq|gte?|lte?|is[A-Z]\w*|has|inRange|includes|startsWith|endsWith|size)$/;

  // An enrollment's goals and conditions read the same text one after the other. It is parsed once:
  // commands that may change the result get a copy of their own.
  let lastText;
  let lastView;

  function parsedOnce(text) {
    if (text !== lastText) {
      lastView = parse(text);
      lastText = text;
    }
    return lastView;
  }

  function reader(operand) {
    if (operand === undefined) return () => undefined;
    const { type, value } = operand;
    if (type === "raw") {
      if (typeof value !== "object" || value === null) return () => value;
      const text = stringify(value);
      return () => parse(text); // lodash may change it
    }
    if (typeof value !== "string" || !PLAIN_PATH.test(value)) return (view) => _.get(view, value);
    const keys = value.split(".");
    return (view) => _.get(view, value in Object(view) ? [value] : keys);
  }

  // A function that a path reached, for a command that may call it often: each call may read the whole
  // view.
  function charged(found, text) {
    if (typeof found !== "function") return found;
    return function (...values) {
      charge(text.length);
      return Reflect.apply(found, this, values);
    };
  }

  function condition(program) {
    const { command, value, compareTo } = parse(program);
    const [ask, read, readOther] = [_[command], reader(value), reader(compareTo)];
    if (ONLY_READS.test(command)) {
      return (text) => {
        const view = parsedOnce(text);
        return !!ask(read(view), readOther(view));
      };
    }
    return (text) => {
      const view = parse(text);
      return !!ask(read(view), charged(readOther(view), text));
    };
  }

  function operands(program) {
    const { value, compareTo } = parse(program);
    return (text) => {
      const view = parse(text);
      const show = (found) => stringify(typeof found === "function" ? String(found) : found) ?? null;
      return stringify([show(reader(value)(view)), show(reader(compareTo)(view))]);
    };
  }

  // The keys of a path, as JSON.
  function keys(text) {
    const path = parse(text);
    const isText = typeof path === "string" || _.isObject(path);
    const found = Array.isArray(path) ? path : isText ? _.toPath(path) : [path];
    return stringify(_.map(found, String));
  }

  // --- the helpers of templates

  const MAX_RENDERED = 1024 * 1024; // characters
  const locales = parse(localesText);
  let rendering; // {source, partials, html, strict, answers, asked}

  function fail(options, sentence) {
    const { source: partial, start, end } = options.loc;
    const source = partial === undefined ? rendering.source : rendering.partials[partial];
    const lines = source.split("\n").slice(start.line - 1, end.line);
    lines[lines.length - 1] = lines.at(-1).slice(0, end.column);
    lines[0] = lines[0].slice(start.column);
    const where = partial === undefined ? "" : `partial '${partial}': `;
    throw new Error(`${where}${_.truncate(lines.join(" "), { length: 100 })}: ${sentence}`);
  }

  function isTrue(value) {
    return !Handlebars.Utils.isEmpty(value) && value !== 0; // as in {{#if}}
  }

  function isMissing(value) {
    return value === undefined || value === null;
  }

  function text(value) {
    const found = isMissing(value) ? "" : String(value);
    charge(found.length);
    return found;
  }

  // What a helper prints for a value, which must exist in strict mode.
  function printed(value, options) {
    if (rendering.strict && isMissing(value)) fail(options, "the value is missing");
    return text(value);
  }

  const SCRIPT_SAFE = /[<>&\u2028\u2029]/g;
  const escaped = (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`;

  function grouped(digits, { group, groupSize, leastBeforeGroup }) {
    if (digits.length < groupSize + leastBeforeGroup) return digits;
    const parts = [];
    for (let end = digits.length; end > 0; end -= groupSize) {
      parts.unshift(digits.slice(Math.max(0, end - groupSize), end));
    }
    return parts.join(group);
  }

  const HELPERS = {
    // Python knows the calendar: request the answers that are missing, then render again.
    date(value, options) {
      if (typeof value !== "string") {
        const found = text(value) === "" ? "missing" : `not a text but ${_.truncate(stringify(value))}`;
        fail(options, `the value is ${found}, write an ISO 8601 text`);
      }
      const { format, zone, locale } = options.hash;
      const timezone = zone || options.data.root?.timezone || "UTC";
      const question = stringify([value, text(format), String(timezone), text(locale)]);
      const answer = rendering.answers[question];
      if (typeof answer === "string") return answer;
      if (answer) fail(options, answer.error);
      rendering.asked.push(question);
      return "";
    },
    default: (...values) => values.slice(0, -1).find((value) => !Handlebars.Utils.isEmpty(value)),
    json(value) {
      const written = stringify(value ?? null);
      return rendering.html ? written.replace(SCRIPT_SAFE, escaped) : written;
    },
    eq: (value, other) => _.eq(value, other),
    ne: (value, other) => !_.eq(value, other),
    gt: (value, other) => _.gt(value, other),
    gte: (value, other) => _.gte(value, other),
    lt: (value, other) => _.lt(value, other),
    lte: (value, other) => _.lte(value, other),
    and: (...values) => values.slice(0, -1).every(isTrue),
    or: (...values) => values.slice(0, -1).some(isTrue),
    not: (value) => !isTrue(value),
    includes: (collection, value) => _.includes(collection, value),
    url: (value, options) => encodeURIComponent(printed(value, options).toWellFormed()),
    number(value, options) {
      const { decimals, locale } = options.hash;
      const number = typeof value === "string" && value.trim() ? Number(value) : value;
      if (typeof number !== "number" || !Number.isFinite(number)) {
        fail(options, text(value) === "" ? "the value is missing" : "the value is not a number");
      }
      if (decimals !== undefined && !(Number.isInteger(decimals) && decimals >= 0 && decimals <= 20)) {
        fail(options, "decimals must be a whole number from 0 to 20");
      }
      const form = formOf(locale);
      const size = Math.abs(number);
      const digits = decimals === undefined ? String(size) : _.round(size, decimals).toFixed(decimals);
      if (digits.includes("e")) return String(number);
      const [whole, fraction] = digits.split(".");
      const sign = number < 0 && /[1-9]/.test(digits) ? form.minus : "";
      return sign + grouped(whole, form) + (fraction ? form.decimal + fraction : "");
    },
    upper: (value, options) => printed(value, options).toUpperCase(),
    lower: (value, options) => printed(value, options).toLowerCase(),
    trim: (value, options) => printed(value, options).trim(),
    capitalize: (value, options) => _.upperFirst(printed(value, options)),
  };

  // "de" for "de-AT" and "de_DE"; English for a language that is not known, as texts have a default.
  function formOf(locale) {
    const name = text(locale).trim().toLowerCase().replaceAll("_", "-");
    const known = [name, name.split("-")[0]].find((one) => Object.hasOwn(locales, one));
    return locales[known ?? "en"];
  }

  // Each with the least and the greatest number of arguments, and its options; without these, any.
  const USES = {
    date: [1, 1, "format", "zone", "locale"],
    default: [1, Infinity],
    json: [1, 1],
    ...Object.fromEntries(_.map(["eq", "ne", "gt", "gte", "lt", "lte"], (name) => [name, [2, 2]])),
    and: [1, Infinity],
    or: [1, Infinity],
    not: [1, 1],
    includes: [2, 2],
    url: [1, 1],
    number: [1, 1, "decimals", "locale"],
    upper: [1, 1],
    lower: [1, 1],
    trim: [1, 1],
    capitalize: [1, 1],
    lookup: [2, 2],
    log: [0, Infinity, "level"],
    if: [1, 1, "includeZero"],
    unless: [1, 1, "includeZero"],
    each: [1, 1],
    with: [1, 1],
  };
  const BLOCKS = ["if", "unless", "each", "with"];

  // --- reading templates

  // The lexer's expressions begin with ^, but QuickJS tries them at each character.
  const { lexer } = Handlebars.Parser;
  // In a style, and in JSON, a tag that begins with two braces ends with two: the third brace belongs
  // to {color:{{data.color}}} or {"text":{{json message}}}. Elsewhere it is a mistake.
  const CONTENT = lexer.rules[0].source;
  const OPENS = "^(?:\\{\\{";
  const OPENED_BY = {
    "^(?:\\}(~)?\\}\\})": "^(?:\\{\\{(~)?\\{)", // {{{x}}}
    "^(?:\\}\\}\\}\\})": "^(?:\\{\\{\\{\\{)", // {{{{x}}}}
  };
  const STYLE = /<\/?style\b/gi;
  const JSON_OBJECT = /^\s*\[?\s*\{\s*"/;
  let opened = "";
  let inBraces = false;
  lexer.rules = lexer.rules.map(({ source }) => {
    const sticky = new RegExp(source, "y");
    return {
      [Symbol.match](input) {
        const opener = inBraces && OPENED_BY[source];
        if (opener && opener !== opened) return null;
        sticky.lastIndex = 0;
        const found = sticky.exec(input);
        if (found && source.startsWith(OPENS)) opened = source;
        if (found && source === CONTENT) {
          const tag = found[0].match(STYLE)?.at(-1);
          if (tag) inBraces = tag[1] !== "/";
        }
        return found;
      },
    };
  });

  // Walks through a template and collects its helpers, the paths that it reads, and its errors.
  class Reader extends Handlebars.Visitor {
    constructor() {
      super();
      this.wrong = []; // [line, kind, name]
      this.constants = []; // [line, helper, option, value] of literal ones; "": the first argument
      this.dates = []; // [keys, {option: text}] of dates that are certainly printed
      this.helpers = new Set();
      this.inlines = new Set(["@partial-block"]); // partials that it defines
      this.used = []; // [line, partial, has a block, is certainly called with the view itself]
      this.isDynamic = false; // it computes the name of a partial
      this.reads = new Set();
      this.surelyReads = new Set(); // certainly from the view itself
      this.fromView = []; // the paths that certainly begin at the view
      this.closed = new Map(); // the ends of the blocks that begin with a path
      this.depth = 0; // how many ../ lead to it
      this.names = []; // of block parameters in scope
      this.atRoot = true; // the current value may be the view itself
      this.surely = true; // it is
    }

    read(source, srcName) {
      inBraces = JSON_OBJECT.test(source);
      const program = Handlebars.parse(source, { srcName });
      this.accept(program);
      return program;
    }

    PathExpression(path) {
      const { data, depth, parts } = path;
      const isLocal = !data && !depth && this.names.includes(parts[0]) &&
        !Handlebars.AST.helpers.scopedId(path);
      if (data ? parts[0] === "root" : depth === this.depth && !isLocal) this.fromView.push(path);
      if (data && parts[0] !== "root") return;
      const found = (data ? parts.slice(1) : parts).join(".") || "this";
      if (data) {
        this.reads.add(found);
        this.surelyReads.add(found);
        return;
      }
      const scoped = Handlebars.AST.helpers.scopedId(path);
      if (!depth && !scoped && this.names.includes(parts[0])) return;
      if (parts.length || depth || this.atRoot) this.reads.add(found);
      if (parts.length && this.surely && !depth) this.surelyReads.add(found);
    }

    // The name of the helper that a tag calls, if it calls one, and visits its arguments.
    call(node, isBlock) {
      const { params = [], hash, path } = node;
      const literal = path.parts === undefined;
      const name = literal ? String(path.original) : path.parts.length === 1 && path.parts[0];
      const isSimple =
        name !== false &&
        (literal || Handlebars.AST.helpers.simpleId(path)) &&
        !this.names.includes(name);
      this.acceptArray(params);
      this.accept(hash);
      const line = node.loc.start.line;
      const known = isSimple && Object.hasOwn(USES, name);
      const called = params.length || hash || node.type === "SubExpression";
      if (!called && !(known && !Object.hasOwn(HELPERS, name))) {
        if (known) node.path = { ...path, type: "PathExpression", depth: 0, parts: [name], original: `./${name}` };
        if (literal) this.reads.add(name);
        else this.accept(path);
        return known ? false : isSimple && name;
      }
      if (!known) {
        const shown = literal ? name : path.original;
        const isHidden = Object.hasOwn(USES, shown) && this.names.includes(shown);
        this.wrong.push([line, isHidden ? "hidden" : "helper", shown]);
        return false;
      }
      const [least, most, ...options] = USES[name];
      const pairs = hash?.pairs ?? [];
      for (const { key, value } of [{ key: "", value: params[0] }, ...pairs]) {
        if (value?.value !== undefined) this.constants.push([line, name, key, value.value]);
      }
      if (isBlock ? Object.hasOwn(HELPERS, name) : BLOCKS.includes(name)) {
        this.wrong.push([line, isBlock ? "inline" : "block", name]);
      } else if (params.length < least || params.length > most ||
          pairs.some(({ key }) => !options.includes(key))) {
        this.wrong.push([line, "use", name]);
      }
      if (name === "date" && this.surely) this.noteDate(params[0], pairs);
      this.helpers.add(name);
      return name;
    }

    noteDate(path, pairs) {
      const fromView = path?.type === "PathExpression" && !path.depth && path.parts.length > 0 &&
        (path.data ? path.parts[0] === "root" : !this.names.includes(path.parts[0]));
      if (!fromView || pairs.some(({ value }) => value.type !== "StringLiteral")) return;
      const options = Object.fromEntries(pairs.map(({ key, value }) => [key, value.value]));
      this.dates.push([path.parts.slice(path.data ? 1 : 0), options]);
    }

    within(program, state) {
      const { names, atRoot, surely, depth } = this;
      Object.assign(this, state, { names: [...names, ...(program?.blockParams ?? [])] });
      this.accept(program);
      Object.assign(this, { names, atRoot, surely, depth });
    }

    MustacheStatement(mustache) {
      this.call(mustache, false);
    }

    SubExpression(call) {
      this.call(call, false);
    }

    BlockStatement(block) {
      const name = this.call(block, true);
      this.closed.set(block.path, block.loc.end);
      this.within(block.program, {
        atRoot: this.atRoot && name !== "with" && name !== "each",
        surely: this.surely && (name === "if" || name === "unless"),
        depth: this.depth + (name === "if" || name === "unless" ? 0 : 1),
      });
      this.within(block.inverse, {});
    }

    partial({ name, params, hash, loc }, hasBlock) {
      this.isDynamic ||= name.type === "SubExpression";
      if (name.type === "SubExpression") this.accept(name);
      else {
        const isSure = this.surely && !params.length && !hash;
        this.used.push([loc.start.line, String(name.original), hasBlock, isSure]);
      }
      this.acceptArray(params);
      this.accept(hash);
    }

    PartialStatement(partial) {
      this.partial(partial, false);
    }

    PartialBlockStatement(partial) {
      this.partial(partial, true);
      const hasView = !partial.params.length && !partial.hash;
      this.within(partial.program, { surely: this.surely && hasView });
    }

    Decorator(decorator) {
      this.wrong.push([decorator.loc.start.line, "decorator", decorator.path.original]);
    }

    DecoratorBlock(decorator) {
      if (decorator.path.original !== "inline" || decorator.params.length !== 1) {
        this.Decorator(decorator);
        return;
      }
      this.inlines.add(String(decorator.params[0].original ?? decorator.params[0].value));
      this.within(decorator.program, { atRoot: true, surely: false });
    }
  }

  // The analysis of a template without rendering it, as JSON.
  function analyse(text) {
    const reader = new Reader();
    reader.read(parse(text));
    const { wrong, constants, dates, reads, surelyReads, inlines, used, isDynamic } = reader;
    const sets = { reads: [...reads], surelyReads: [...surelyReads], inlines: [...inlines] };
    return stringify({ wrong, constants, dates, ...sets, used, isDynamic });
  }

  // The template with other names for keys of the view.
  function rename(text) {
    const { source, names } = parse(text);
    const reader = new Reader();
    reader.read(source);
    const lines = [0, ..._.map([...source.matchAll(/\r\n?|\n/g)], (end) => end.index + end[0].length)];
    const offset = ({ line, column }) => lines[line - 1] + column;
    const places = _.flatMap(reader.fromView, (path) => {
      const key = path.parts[path.data ? 1 : 0];
      const found = [[offset(path.loc.start), offset(path.loc.end), key]];
      const end = reader.closed.has(path) ? offset(reader.closed.get(path)) : 0;
      const close = source.lastIndexOf("{{", end - 2);
      if (/^\{\{~?\//.test(source.slice(close, end))) found.push([close, end, key]);
      return found;
    });
    const parts = [];
    let rest = 0;
    for (const [start, end, key] of _.sortBy(places, 0)) {
      if (!Object.hasOwn(names, key)) continue;
      const path = source.slice(start, end);
      const at = path.search(new RegExp(`(?<![\\w$-])${key}(?![\\w$-])`));
      if (at < 0) continue;
      parts.push(source.slice(rest, start + at), names[key]);
      rest = start + at + key.length;
    }
    return [...parts, source.slice(rest)].join(""); // a sum of long texts is none for Python
  }

  // --- rendering

  // {{{a}}}{{{b}}} with 1 and 2 prints 12: adjacent numbers are not added.
  const { append } = Handlebars.JavaScriptCompiler.prototype;
  Handlebars.JavaScriptCompiler.prototype.append = function () {
    if (!this.isInline()) {
      append.call(this);
      return;
    }
    this.replaceStack((value) => [' != null ? "" + ', value, ' : ""']);
    this.pushSource(this.appendToBuffer(this.popStack()));
  };

  for (const [name, helper] of Object.entries(HELPERS)) Handlebars.registerHelper(name, helper);
  const knownHelpers = _.mapValues(USES, () => true);

  // In strict mode a tag that prints a value needs one. Arguments of blocks, conditions and `default`
  // may be missing.
  function requireValues(container) {
    const { lookupProperty } = container;
    const read = (parent, name) => (isMissing(parent) ? undefined : lookupProperty(parent, name));
    container.lookupProperty = read;
    container.strict = (parent, name, loc) => {
      const value = read(parent, name);
      if (isMissing(value)) fail({ loc }, "the value is missing");
      return value;
    };
  }

  // The templates of a message are rendered one after the other, and none can change the view.
  let last = { text: "null", view: null };

  function viewOf(text) {
    if (text !== last.text) last = { text, view: parse(text) };
    return last.view;
  }

  // The slow part of compiling a template: return the specifications of its parts, and the helpers
  // that it calls.
  function translate(program) {
    const { source, partials = {}, html, strict } = parse(program);
    const used = new Set(["helperMissing", "blockHelperMissing"]);
    const written = (text, name) => {
      const reader = new Reader();
      const tree = reader.read(text, name);
      const spec = Handlebars.precompile(tree, { noEscape: !html, knownHelpers, strict });
      for (const helper of reader.helpers) used.add(helper);
      return `(${spec})`;
    };
    return stringify([written(source), _.mapValues(partials, written), [...used]]);
  }

  function template(program, translated) {
    const { source, partials = {}, html, strict } = parse(program);
    // only the helpers that it calls, because the runtime copies them for each rendering
    const [mainSpec, partialSpecs, used] = parse(translated ?? translate(program));
    // calls `begin` before a part is rendered for the first time
    const beginning = (made, begin) => {
      const { main } = made;
      let isBegun = false;
      const whole = (container, ...values) => {
        if (!isBegun) {
          isBegun = true;
          if (strict) requireValues(container);
          begin(container);
        }
        return main(container, ...values);
      };
      return { ...made, main: whole };
    };
    let prepared; // what the runtime makes for each rendering, unless it is that of a partial
    const mainParts = beginning(compile(mainSpec), (container) => {
      prepared = {
        ..._.pick(container, ["decorators", "helpers", "hooks", "partials", "protoAccessControl"]),
        partial: true,
      };
    });
    const partialParts = _.mapValues(partialSpecs, (spec) => beginning(compile(spec), _.noop));
    const environment = {
      ..._.pick(Handlebars, ["VM", "decorators", "escapeExpression", "log"]),
      helpers: _.pick(Handlebars.helpers, used),
      partials: {},
    };
    environment.partials = _.mapValues(partialParts, (made) => Handlebars.VM.template(made, environment));
    const run = Handlebars.VM.template(mainParts, environment);
    const render = (view) =>
      prepared ? run(view, { ...prepared, data: { root: view } }) : run(view);
    return (viewText, answersText) => {
      const answers = answersText ? parse(answersText) : {};
      rendering = { source, partials, html, strict, answers, asked: [] };
      let written = "";
      try {
        written = render(viewOf(viewText));
      } catch (error) {
        if (!rendering.asked.length) throw error;
      }
      if (rendering.asked.length) return stringify(["ask", ...rendering.asked]);
      if (written.length > MAX_RENDERED) {
        throw new Error(`more than ${MAX_RENDERED} characters are rendered`);
      }
      if (written.includes("\0")) written = written.replaceAll("\0", "\ufffd");
      return `=${written}`.toWellFormed();
    };
  }

  // --- no evaluation has an effect on the next one

  // Names inherited from Object.prototype can nevertheless be set on own objects.
  const inherited = [];
  for (const key of Object.getOwnPropertyNames(Object.prototype)) {
    const { value, writable } = Object.getOwnPropertyDescriptor(Object.prototype, key);
    if (!writable) continue;
    inherited.push(value);
    Object.defineProperty(Object.prototype, key, {
      get: () => value,
      set(own) {
        if (this === Object.prototype) throw new TypeError(`${key} cannot be changed`);
        Object.defineProperty(this, key, {
          value: own, configurable: true, enumerable: true, writable: true,
        });
      },
    });
  }
  for (const key of ["message", "name", "stack", "description", "fileName", "lineNumber", "number",
    "endLineNumber"]) {
    Object.defineProperty(Handlebars.Exception.prototype, key, { value: "", writable: true });
  }

  const frozen = new Set([Handlebars.Exception.prototype]);
  function freeze(value) {
    if ((typeof value !== "object" && typeof value !== "function") || value === null) return;
    if (frozen.has(value)) return;
    frozen.add(value);
    Object.freeze(value);
    freeze(Object.getPrototypeOf(value));
    for (const { value: inner, get, set } of Object.values(Object.getOwnPropertyDescriptors(value))) {
      freeze(inner);
      freeze(get);
      freeze(set);
    }
  }
  freeze(inherited); // which only the getters know
  freeze(_);
  freeze(Handlebars.helpers);
  freeze(locales);
  freeze(HELPERS);
  freeze(USES);
  freeze((function* () {})().constructor);
  freeze(async () => {});
  freeze(/x/);
  freeze(globalThis);

  const makers = { analyse, condition, keys, operands, rename, template, translate };
  return (maker, text, translated) => makers[maker](text, translated ?? undefined);
};

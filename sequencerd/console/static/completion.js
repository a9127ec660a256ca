"use strict";
// What can be written at a place of a sequence's YAML, by the JSON Schema of files. The text need not
// be whole: the place is found by indentation alone.

const Completion = (() => {
  const KEY = /^("[^"]*"|'[^']*'|[^\s#"'{[&*!|>%@`-][^:#]*?|-[^\s:][^:#]*?)\s*:(?=\s|$)/;
  const BLOCK = /:\s*[|>][-+0-9]*\s*(#.*)?$/;
  const plain = (text) => text.trim().replace(/^(["'])(.*)\1$/, "$2");

  // The items and keys with which a line begins: [{ column, key, value }], without `key` for "- ".
  function entries(line) {
    const found = [];
    let column = line.length - line.trimStart().length;
    while (/^-(\s|$)/.test(line.slice(column))) {
      found.push({ column });
      column += 1 + (line.slice(column + 1).length - line.slice(column + 1).trimStart().length);
    }
    const key = KEY.exec(line.slice(column));
    if (key) {
      found.push({ column, key: plain(key[1]), value: plain(line.slice(column + key[0].length)) });
    }
    return found;
  }

  const isBlank = (line) => /^\s*(#.*)?$/.test(line);
  const indentation = (line) => line.length - line.trimStart().length;

  // The keys that lead to a column of a line, null for items, and whether it is within a text.
  function pathAt(lines, number, column) {
    const path = [];
    let limit = column;
    const climb = (one, at) => {
      const isAbove = one.column < limit
        || one.key !== undefined && one.column === limit && path[0]?.key === undefined && path.length > 0;
      if (isAbove) {
        path.unshift({ ...one, line: at });
        limit = one.column;
      }
    };
    for (const one of entries(lines[number]).reverse()) if (one.column < column) climb(one, number);
    for (let at = number - 1; at >= 0 && (limit > 0 || path[0]?.key === undefined); at -= 1) {
      if (isBlank(lines[at]) || indentation(lines[at]) > limit) continue;
      for (const one of entries(lines[at]).reverse()) climb(one, at);
    }
    const isText = path.some((one) => one.key !== undefined && one.line < number && BLOCK.test(lines[one.line]));
    return { path, isText };
  }

  // The keys at a column around a line, in one mapping: { key: value }.
  function siblings(lines, number, column) {
    const found = {};
    const look = (at) => {
      if (isBlank(lines[at])) return true;
      const line = entries(lines[at]);
      const own = line.find((one) => one.column === column && one.key !== undefined);
      if (own) found[own.key] = own.value;
      return (line[0]?.column ?? indentation(lines[at])) >= column;
    };
    for (let at = number; at >= 0 && look(at); at -= 1);
    for (let at = number + 1; at < lines.length && (isBlank(lines[at]) || indentation(lines[at]) >= column) && look(at); at += 1);
    return found;
  }

  // A schema with what it refers to, and its alternatives, as far as the values allow them.
  function expand(root, schema, values) {
    if (!schema || typeof schema !== "object") return [];
    if (schema.$ref) return expand(root, root.$defs[schema.$ref.replace("#/$defs/", "")], values);
    const holds = (test) => test.not ? !holds(test.not)
      : (test.required ?? []).every((key) => key in values)
        && (test.enum === undefined)
        && Object.entries(test.properties ?? {}).every(([key, one]) => matches(one, values[key]));
    const matches = (one, value) => one.not ? !matches(one.not, value)
      : one.enum ? one.enum.includes(value)
      : one.const === undefined || value === undefined || String(one.const) === value;
    const own = [schema];
    for (const one of [...(schema.anyOf ?? []), ...(schema.oneOf ?? [])]) own.push(...expand(root, one, values));
    for (const one of schema.allOf ?? []) {
      if (!one.if) own.push(...expand(root, one, values));
      else if (holds(one.if)) own.push(...expand(root, one.then, values));
    }
    return own;
  }

  // The schemas of what the path leads to. `below` are the values of the last mapping.
  function schemasAt(root, lines, path, below) {
    let schemas = [root];
    path.forEach((one) => {
      const values = one.key === undefined ? {} : siblings(lines, one.line, one.column);
      const expanded = schemas.flatMap((schema) => expand(root, schema, values));
      schemas = expanded.flatMap((schema) => one.key === undefined
        ? [schema.items]
        : [schema.properties?.[one.key]
          ?? (typeof schema.additionalProperties === "object" ? schema.additionalProperties : null)]
      ).filter(Boolean);
    });
    return schemas.flatMap((schema) => expand(root, schema, below));
  }

  const NAMES_STEP = new Set(["next", "altNext", "step"]);

  // The names of steps: what is deeper than a key of the first step is no key of another.
  function stepNames(lines) {
    const found = [];
    let column = null;
    for (const line of lines.slice(lines.findIndex((one) => /^steps:/.test(one)) + 1)) {
      const all = isBlank(line) ? [] : entries(line);
      column ??= all.find((one) => one.key !== undefined)?.column ?? null;
      const name = all.find((one) => one.key === "name" && one.column === column);
      if (name?.value) found.push(name.value);
    }
    return found;
  }

  // The options at a position, and where what they replace begins; null where there is nothing to say.
  function complete(text, position, root, known) {
    const before = text.slice(0, position);
    const lines = text.split("\n");
    const number = before.split("\n").length - 1;
    const start = before.lastIndexOf("\n") + 1;
    const line = before.slice(start);
    if (/(^|\s)#/.test(line) || /[{[]/.test(line)) return null;
    const own = entries(line).find((one) => one.key !== undefined);
    const typed = (own ? /[^\s:]*$/ : /[^\s-]*$|-[^\s]*$/).exec(line)[0];
    const from = position - typed.length;
    if (own) return valuesFor(lines, number, own, from, root, known);
    const column = line.length - typed.length;
    // the key that is being typed must not count as one that is there
    lines[number] = lines[number].slice(0, column);
    const { path, isText } = pathAt(lines, number, column);
    if (isText) return null;
    const there = siblings(lines, number, column);
    const options = new Map();
    for (const schema of schemasAt(root, lines, path, there)) {
      for (const [key, one] of Object.entries(schema.properties ?? {})) {
        if (key in there || options.has(key)) continue;
        options.set(key, { label: key, type: "property", info: one.description, apply: `${key}: ` });
      }
    }
    return options.size ? { from, options: [...options.values()] } : null;
  }

  function valuesFor(lines, number, own, from, root, known) {
    const { path, isText } = pathAt(lines, number, own.column);
    if (isText) return null;
    const there = siblings(lines, number, own.column);
    const options = new Map();
    const offer = (label, type, info) => {
      if (!options.has(label)) options.set(label, { label, type, info });
    };
    const isElsewhere = there.sequence && own.key === "step";
    if (NAMES_STEP.has(own.key) && !isElsewhere) stepNames(lines).forEach((name) => offer(name, "variable"));
    if (own.key === "sequence") known.sequences.forEach((name) => offer(name, "variable"));
    const steps = schemasAt(root, lines, [...path, { ...own, line: number }], {});
    for (const schema of steps) {
      if (schema.const !== undefined) offer(String(schema.const), "enum", schema.description);
      for (const value of schema.enum ?? []) offer(String(value), "enum");
      if (schema.type === "boolean") ["true", "false"].forEach((word) => offer(word, "keyword"));
      if (schema.type === "null") offer("null", "keyword");
    }
    const isStepType = own.key === "type" && path.length === 2 && path[0].key === "steps";
    if (isStepType) known.types.forEach((name) => offer(name, "type", "A runner of yours."));
    return options.size ? { from, options: [...options.values()] } : null;
  }

  return { complete };
})();

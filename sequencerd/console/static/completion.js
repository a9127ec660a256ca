"use strict";
// Complete a sequence's YAML by the JSON Schema of files. The text may be incomplete: only the
// indentation decides where a position is.

const Completion = (() => {
  const KEY = /^("[^"]*"|'[^']*'|[^\s#"'{[&*!|>%@`-][^:#]*?|-[^\s:][^:#]*?)\s*:(?=\s|$)/;
  const BLOCK = /:\s*[|>][-+0-9]*\s*(#.*)?$/;
  const plain = (text) => text.trim().replace(/^(["'])(.*)\1$/, "$2");

  // The items and keys with which a line begins: [{ column, key, value, end }], without `key` for "- ";
  // `end` is where the key's colon ends.
  function entries(line) {
    const found = [];
    let column = line.length - line.trimStart().length;
    while (/^-(\s|$)/.test(line.slice(column))) {
      found.push({ column });
      column += 1 + (line.slice(column + 1).length - line.slice(column + 1).trimStart().length);
    }
    const key = KEY.exec(line.slice(column));
    if (key) {
      const end = column + key[0].length;
      found.push({ column, key: plain(key[1]), value: plain(line.slice(end)), end });
    }
    return found;
  }

  const isBlank = (line) => /^\s*(#.*)?$/.test(line);
  const indentation = (line) => line.length - line.trimStart().length;

  // The mappings and lists in {} and [] that a line opens from a column on and that contain a position: the
  // outermost first, each with its values and the key at the position. Null if there are none.
  function flowAt(line, from, position) {
    const first = line.slice(from).trimStart()[0];
    if (first !== "{" && first !== "[") return null;
    const open = [];
    let found = null;
    let token = "";
    let isCut = false; // what is being typed is ignored
    const end = () => {
      const last = open.at(-1);
      if (last.key !== undefined && !isCut) last.values[last.key] = plain(token);
      last.key = undefined;
      token = "";
      isCut = false;
    };
    for (let at = from; at <= line.length; at += 1) {
      if (at === position) {
        found = open.map((one) => ({ ...one }));
        isCut = true;
      }
      const one = line[at];
      if (one === undefined || one === "#" && /\s/.test(line[at - 1])) break;
      if (/["']/.test(one) && !token.trim()) {
        for (token = one, at += 1; at < line.length && line[at] !== one; at += 1) {
          if (at === position) return null;
          token += line[at];
        }
        if (at === position) found = open.map((each) => ({ ...each }));
        token += one;
      } else if (one === "{" || one === "[") {
        open.push({ isList: one === "[", values: {}, key: undefined });
        token = "";
      } else if (one === "}" || one === "]") {
        end();
        open.pop();
        if (open.length === 0) break;
      } else if (one === ",") {
        end();
      } else if (one === ":" && open.at(-1).key === undefined && /[\s,}"']|undefined/.test(line[at + 1] + "")) {
        open.at(-1).key = isCut ? undefined : plain(token);
        token = "";
      } else {
        token += one;
      }
    }
    return found?.length ? found : null;
  }

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

  // A schema with the definitions that it refers to, and the alternatives that the values allow.
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

  // The schemas of the values at a path. `below` are the values of the last mapping.
  function schemasAt(root, lines, path, below) {
    let schemas = [root];
    path.forEach((one) => {
      const values = one.key === undefined ? {} : one.values ?? siblings(lines, one.line, one.column);
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

  // The names of steps: a line that is indented deeper than a key of the first step is no key of a step.
  function stepNames(lines) {
    const found = [];
    let column = null;
    for (const line of lines.slice(lines.findIndex((one) => /^["']?steps["']?:/.test(one)) + 1)) {
      const all = isBlank(line) ? [] : entries(line);
      const flow = /^\s*-\s+\{\s*name:\s*("[^"]*"|'[^']*'|[^,}]+)/.exec(line);
      if (flow) found.push(plain(flow[1]));
      column ??= all.find((one) => one.key !== undefined)?.column ?? null;
      const name = all.find((one) => one.key === "name" && one.column === column);
      if (name?.value) found.push(name.value);
    }
    return found;
  }

  // The options at a position, and where the text that they replace begins; null if there are none.
  function complete(text, position, root, known) {
    const lines = text.split("\n");
    const before = text.slice(0, position).split("\n");
    const number = before.length - 1;
    const line = before[number];
    if (/(^|\s)#/.test(line)) return null;
    const found = entries(line);
    const own = found.find((one) => one.key !== undefined);
    const begin = own?.end ?? (found.length ? line.search(/[^\s-]|$/) : 0);
    const flow = flowAt(lines[number], begin, line.length);
    if (flow) return inFlow(lines, number, own, begin, flow, line, position, root, known);
    if (/^\s*[{[]/.test(line.slice(begin))) return null;
    const typed = (own ? line.slice(own.end).trimStart() : /[^\s-]*$|-[^\s]*$/.exec(line)[0]).replace(/^["']/, "");
    const from = position - typed.length;
    if (own) {
      const { path, isText } = pathAt(lines, number, own.column);
      if (isText) return null;
      return offered(from, values(lines, path, { ...own, line: number }, siblings(lines, number, own.column), root, known));
    }
    const column = line.length - typed.length;
    // the key that is being typed does not count as present
    lines[number] = lines[number].slice(0, column);
    const { path, isText } = pathAt(lines, number, column);
    if (isText) return null;
    const there = siblings(lines, number, column);
    const schemas = schemasAt(root, lines, path, there);
    return offered(from, [...keys(schemas, there), ...(found.length ? constants(schemas) : [])]);
  }

  // The same within {} or [].
  function inFlow(lines, number, own, begin, flow, line, position, root, known) {
    const { path, isText } = pathAt(lines, number, own?.column ?? begin);
    if (isText) return null;
    if (own) path.push({ ...own, line: number });
    const last = flow.pop();
    for (const one of flow) path.push(one.isList ? {} : one);
    const typed = /[^\s:"'{}[\],]*$/.exec(line)[0];
    const from = position - typed.length;
    if (last.isList) return offered(from, constants(schemasAt(root, lines, [...path, {}], {})));
    if (last.key === undefined) return offered(from, keys(schemasAt(root, lines, path, last.values), last.values));
    return offered(from, values(lines, path, last, last.values, root, known));
  }

  // The first option with each label.
  function offered(from, options) {
    const unique = new Map(options.reverse().map((one) => [one.label, one]));
    return unique.size ? { from, options: [...unique.values()].reverse() } : null;
  }

  function keys(schemas, there) {
    return schemas.flatMap((schema) => Object.entries(schema.properties ?? {}))
      .filter(([key]) => !(key in there))
      .map(([key, one]) => ({ label: key, type: "property", info: one.description, apply: `${key}: ` }));
  }

  function values(lines, path, own, there, root, known) {
    const options = [];
    const isElsewhere = there.sequence && own.key === "step";
    if (NAMES_STEP.has(own.key) && !isElsewhere) options.push(...stepNames(lines).map(name));
    if (own.key === "sequence") options.push(...known.sequences.map(name));
    options.push(...constants(schemasAt(root, lines, [...path, own], {})));
    const isStepType = own.key === "type" && path.length === 2 && path[0].key === "steps";
    if (isStepType) options.push(...known.types.map((one) => ({ label: one, type: "type", info: "A runner of yours." })));
    return options;
  }

  const IS_PLAIN = /^[a-z_](?!.*(: |:$| #))[^[\]{},"'\n]*$/i;
  const IS_OTHER = /^(true|false|yes|no|on|off|null|y|n)$/i;

  // A name is quoted if YAML would read it as something else.
  function name(label) {
    const isPlain = IS_PLAIN.test(label) && !IS_OTHER.test(label) && label === label.trim();
    return { label, type: "variable", apply: isPlain ? label : JSON.stringify(label) };
  }

  function constants(schemas) {
    return schemas.flatMap((schema) => [
      ...(schema.const === undefined ? [] : [{ label: String(schema.const), type: "enum", info: schema.description }]),
      ...(schema.enum ?? []).map((value) => ({ label: String(value), type: "enum" })),
      ...(schema.type === "boolean" ? ["true", "false"] : schema.type === "null" ? ["null"] : [])
        .map((label) => ({ label, type: "keyword" })),
    ]);
  }

  return { complete };
})();

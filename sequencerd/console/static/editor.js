"use strict";
// The editor of a sequence's YAML, in place of the textarea, which keeps the text for the form.

(() => {
  const area = document.getElementById("text");
  const form = area.form;
  const {
    EditorState, EditorView, HighlightStyle, autocompletion, bracketMatching, closeBrackets,
    closeBracketsKeymap, completionKeymap, defaultKeymap, drawSelection, foldGutter, foldKeymap,
    highlightActiveLine, highlightSpecialChars, history, historyKeymap, indentOnInput, indentUnit,
    indentWithTab, keymap, lineNumbers, lintGutter, lintKeymap, linter, syntaxHighlighting, tags, yaml,
  } = CodeMirror;

  // the colours are those of the page, in both schemes
  const theme = EditorView.theme({
    "&": { border: "1px solid var(--field, var(--soft))", borderRadius: "6px", background: "var(--back)", color: "var(--text)" },
    "&.cm-focused": { outline: "2px solid var(--accent)", outlineOffset: "1px" },
    ".cm-scroller": { font: "0.87rem/1.5 var(--mono)", minHeight: "12rem", maxHeight: "70vh", overflow: "auto" },
    ".cm-content": { caretColor: "var(--text)" },
    ".cm-cursor": { borderLeftColor: "var(--text)" },
    ".cm-gutters": { background: "var(--raised)", color: "var(--soft)", border: "0" },
    ".cm-activeLine": { background: "transparent" },
    ".cm-activeLineGutter": { background: "var(--tint)" },
    "&.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground, .cm-selectionBackground": { background: "var(--tint)" },
    "&.cm-focused .cm-matchingBracket": { background: "var(--tint)", outline: "1px solid var(--accent)" },
    ".cm-foldPlaceholder": { background: "var(--raised)", color: "var(--soft)", border: "1px solid var(--line)" },
    ".cm-tooltip": { background: "var(--back)", color: "var(--text)", border: "1px solid var(--line)", borderRadius: "6px", maxWidth: "min(34rem, 92vw)" },
    ".cm-tooltip-autocomplete > ul > li[aria-selected]": { background: "var(--accent)", color: "var(--on-accent)" },
    ".cm-tooltip.cm-completionInfo": { padding: "0.4rem 0.6rem", whiteSpace: "normal" },
    ".cm-diagnostic": { fontFamily: "inherit", padding: "0.3rem 0.6rem", overflowWrap: "anywhere" },
    ".cm-diagnostic-error": { borderLeftColor: "var(--bad)" },
    ".cm-diagnostic-warning": { borderLeftColor: "var(--warn)" },
    ".cm-lintRange-error": { backgroundImage: "none", textDecoration: "underline wavy var(--bad)" },
    ".cm-lintRange-warning": { backgroundImage: "none", textDecoration: "underline wavy var(--warn)" },
    ".cm-lintRange-active": { backgroundColor: "var(--bad-tint)" },
    // instead of images in styles, which the page's policy forbids
    ".cm-lint-marker": { width: "auto", height: "auto" },
    ".cm-lint-marker-error": { content: "none", color: "var(--bad)" },
    ".cm-lint-marker-warning": { content: "none", color: "var(--warn)" },
    ".cm-lint-marker-error::before, .cm-lint-marker-warning::before": { content: "'●'" },
    ".cm-panels": { background: "var(--raised)", color: "var(--text)", borderTop: "1px solid var(--line)" },
    ".cm-panel.cm-panel-lint ul [aria-selected]": { background: "var(--tint)", color: "var(--text)" },
    ".cm-panel.cm-panel-lint button[name=close]": { color: "var(--text)", padding: "0.2rem 0.6rem" },
  });
  const highlighting = HighlightStyle.define([
    { tag: [tags.definition(tags.propertyName), tags.propertyName], color: "var(--accent)" },
    { tag: tags.string, color: "var(--good)" },
    { tag: [tags.comment, tags.meta], color: "var(--soft)", fontStyle: "italic" },
    { tag: [tags.keyword, tags.bool, tags.number, tags.labelName, tags.typeName], color: "var(--warn)" },
    { tag: tags.invalid, color: "var(--bad)" },
  ]);

  const known = { types: JSON.parse(area.dataset.types), sequences: JSON.parse(area.dataset.sequences) };
  let schema = null;

  async function complete(context) {
    schema ??= fetch(area.dataset.schema).then((answer) => answer.ok ? answer.json() : null, () => null);
    const root = await schema;
    if (!root) return null;
    const found = Completion.complete(context.state.doc.toString(), context.pos, root, known);
    if (!found) return null;
    const isAsked = context.explicit || found.from < context.pos
      || /: $|[{[,] ?$/.test(context.state.sliceDoc(context.pos - 2, context.pos));
    return isAsked ? { ...found, validFor: /^[\w. -]*$/ } : null;
  }

  // the errors that the server finds, by the same check as for a plan
  async function check(view) {
    const body = new URLSearchParams({ token: form.elements.token.value, text: view.state.doc.toString() });
    const answer = await fetch(area.dataset.check, { method: "POST", body });
    if (!answer.ok || answer.redirected) return [];
    const { doc } = view.state;
    return (await answer.json()).map((one) => {
      const line = doc.line(Math.min(Math.max(one.line, 1), doc.lines));
      const first = line.text.length - line.text.trimStart().length;
      const from = line.from + Math.min(Math.max(one.column - 1, first), line.length);
      return {
        from, to: Math.max(line.from + line.text.trimEnd().length, from),
        severity: one.is_error ? "error" : "warning",
        message: one.step ? `${one.step}: ${one.message}` : one.message,
      };
    });
  }

  const view = new EditorView({
    state: EditorState.create({
      doc: area.value,
      extensions: [
        EditorView.cspNonce.of(area.dataset.nonce),
        EditorView.contentAttributes.of({
          "aria-labelledby": "text-label", "aria-describedby": "text-keys", spellcheck: "false",
          autocapitalize: "off", tabindex: "0",
        }),
        EditorState.tabSize.of(2), indentUnit.of("  "),
        lineNumbers(), foldGutter(), lintGutter(), highlightActiveLine(), highlightSpecialChars(),
        history(), drawSelection(), indentOnInput(), bracketMatching(), closeBrackets(),
        yaml(), syntaxHighlighting(highlighting), theme,
        autocompletion({ override: [complete], icons: false }),
        linter(check, { delay: 400 }),
        keymap.of([
          ...closeBracketsKeymap, ...completionKeymap, ...lintKeymap, ...foldKeymap, ...historyKeymap,
          ...defaultKeymap, indentWithTab,
        ]),
        EditorView.updateListener.of((update) => {
          if (update.docChanged) area.value = update.state.doc.toString();
        }),
      ],
    }),
  });
  // a page that is shown again has the text of the form
  window.addEventListener("pageshow", () => {
    if (area.value !== view.state.doc.toString()) {
      view.dispatch({ changes: { from: 0, to: view.state.doc.length, insert: area.value } });
    }
  });
  document.getElementById("text-label").addEventListener("click", () => view.focus());
  document.getElementById("text-keys").hidden = false;
  area.hidden = true;
  area.after(view.dom);
})();

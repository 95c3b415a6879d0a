"""The style sheet of the report: paper and ink, light or dark as the reader's system asks."""

STYLE = """
:root {
  --paper: #fbfaf7; --card: #ffffff; --ink: #22252b; --soft: #686d76; --rule: #e3e0d8;
  --track: #eceae3; --good: #2c7a4b; --bad: #b23b3b; --fair: #8f6a12;
  --c0: #2f6cad; --c1: #c4622a; --c2: #3a8a5a; --c3: #a64470;
  --c4: #7562b5; --c5: #967719; --c6: #23919a; --c7: #6f7681;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181c; --card: #1e2126; --ink: #e3e1db; --soft: #9a9ea6; --rule: #31353c;
    --track: #2a2e34; --good: #7cc796; --bad: #ea8a84; --fair: #dcbc6a;
    --c0: #79b0e8; --c1: #eb9d68; --c2: #7ec99b; --c3: #e38bb0;
    --c4: #b2a4ee; --c5: #d8bc63; --c6: #6dcdd4; --c7: #a5acb7;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 48px 24px 72px; }
h1, h2, h3 { font-family: Charter, "Iowan Old Style", Palatino, Georgia, serif; font-weight: 600; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 28px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 0 0 16px; }
h3 { font-size: 16px; margin: 28px 0 8px; }
section { border-top: 1px solid var(--rule); padding-top: 28px; margin-top: 40px; }
section > p { color: var(--soft); max-width: 70ch; margin: 0 0 18px; }
small { color: var(--soft); font-size: 12px; font-weight: 400; }
ul { list-style: none; margin: 0; padding: 0; }
b { font-weight: 600; }

.tiles { display: flex; flex-wrap: wrap; gap: 20px 56px; }
.tile p { margin: 0; color: var(--soft); }
.tile strong { display: block; font: 600 38px/1.2 Charter, Palatino, Georgia, serif; }
.tile small { display: block; line-height: 1.45; font-variant-numeric: tabular-nums; }

.notes { color: var(--soft); margin-bottom: 18px; max-width: 78ch; }
.notes li { padding-left: 14px; position: relative; margin: 3px 0; }
.notes li::before { content: "–"; position: absolute; left: 0; }

.wide { overflow-x: auto; }
table.scores { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scores th { text-align: left; font-weight: 400; padding: 4px 12px 4px 0; }
.scores td, .scores thead th { text-align: right; padding: 4px 0 4px 16px; white-space: nowrap; }
.scores thead th { color: var(--soft); font-size: 13px; vertical-align: bottom; }
.scores tbody tr:not(.group) { border-top: 1px solid var(--rule); }
.scores tr.group + tr { border-top: none; }
.scores .group th {
  padding: 18px 0 4px; font-size: 12px; color: var(--soft);
  letter-spacing: 0.06em; text-transform: uppercase;
}
.scores .bars { width: 36%; min-width: 160px; padding-left: 0; text-align: left; }
.scores td:nth-child(3) { font-weight: 600; }
.bar { position: relative; height: 10px; background: var(--track); border-radius: 2px; }
.fill { position: absolute; inset: 0 auto 0 0; background: var(--c0); border-radius: 2px; }
.mark { position: absolute; top: -3px; bottom: -3px; width: 3px; margin-left: -1.5px;
  border-radius: 1px; box-shadow: 0 0 0 1.5px var(--paper); }
.m1 { background: var(--c1); } .m2 { background: var(--ink); }
.m3 { background: var(--c2); } .m4 { background: var(--c4); }
.key { position: relative; display: inline-block; inset: auto; margin: 0 6px 0 0; }
.key.fill { width: 16px; height: 9px; }
.key.mark { width: 3px; height: 13px; vertical-align: -2px; box-shadow: none; }

.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; color: var(--soft); }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  vertical-align: 3px; margin-right: 6px; }
figure { margin: 0 0 22px; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 18px; align-items: baseline;
  margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft);
  font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); fill: none; } .axis { stroke: var(--soft); fill: none; opacity: 0.6; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.raw { fill: none; stroke-width: 1; opacity: 0.4; stroke-linejoin: round; }
.dot { stroke: var(--paper); stroke-width: 1; }
path.c0 { stroke: var(--c0); } .dot.c0 { fill: var(--c0); } .swatch.c0 { background: var(--c0); }
path.c1 { stroke: var(--c1); } .dot.c1 { fill: var(--c1); } .swatch.c1 { background: var(--c1); }
path.c2 { stroke: var(--c2); } .dot.c2 { fill: var(--c2); } .swatch.c2 { background: var(--c2); }
path.c3 { stroke: var(--c3); } .dot.c3 { fill: var(--c3); } .swatch.c3 { background: var(--c3); }
path.c4 { stroke: var(--c4); } .dot.c4 { fill: var(--c4); } .swatch.c4 { background: var(--c4); }
path.c5 { stroke: var(--c5); } .dot.c5 { fill: var(--c5); } .swatch.c5 { background: var(--c5); }
path.c6 { stroke: var(--c6); } .dot.c6 { fill: var(--c6); } .swatch.c6 { background: var(--c6); }
path.c7 { stroke: var(--c7); } .dot.c7 { fill: var(--c7); } .swatch.c7 { background: var(--c7); }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr));
  gap: 4px 28px; }
.small .legend { display: contents; }
.small .legend li { font-size: 0; }
.small .legend li b { font-size: 13px; }
.small .swatch { display: none; }

.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr));
  gap: 18px; }
.card { display: flex; gap: 18px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; padding: 16px; overflow-wrap: anywhere; }
.card img { width: 148px; align-self: flex-start; border-radius: 3px; flex: none; }
.card > div { flex: 1; min-width: 0; }
.card p { margin: 0 0 8px; }
.kind { font-size: 12px; color: var(--soft); display: flex; justify-content: space-between;
  gap: 12px; }
.right { color: var(--good); } .wrong { color: var(--bad); } .partly { color: var(--fair); }
.question { white-space: pre-line; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: 1px 12px; margin: 0 0 10px; }
.card dt, .thinking span { color: var(--soft); font-size: 13px; }
.card dd { margin: 0; }
.thinking { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; }
.thinking span { margin-right: 4px; }
.thinking code { font: 12px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  background: var(--track); border-radius: 3px; padding: 0 5px; }
.metrics { color: var(--soft); font-size: 12px; }

.depth { display: grid; grid-template-columns: repeat(3, minmax(0, 240px)); gap: 6px 14px;
  margin-bottom: 20px; }
.depth figure { margin: 0; }
.depth img { width: 100%; border-radius: 3px; image-rendering: pixelated; display: block; }
.depth figcaption, .depth p { font-size: 12px; color: var(--soft); margin: 4px 0 0; }
.depth p { grid-column: 1 / -1; }
.quantities { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr));
  gap: 16px 28px; margin: 0; }
.quantities dt { color: var(--soft); font-size: 13px; }
.quantities dd { margin: 0; font-size: 18px; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; font: 12px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: 14px; }
@media (max-width: 560px) {
  main { padding: 28px 16px 48px; }
  .scores .bars { display: none; }
  .scores td, .scores thead th { padding-left: 10px; }
  .card { flex-direction: column; }
  .card img { width: 100%; }
}
"""

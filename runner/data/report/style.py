"""How a report looks: one style sheet, light or dark as the reader's system is."""

STYLE = """
:root { --back: #fff; --card: #f4f5f7; --ink: #1c1e21; --soft: #5c636e; --line: #d8dce2;
  --image: #2f6fd0; --video: #d0762f; --serious: #c0392b; --mild: #7a828e; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --card: #212428; --ink: #e8eaed;
  --soft: #a0a7b1; --line: #3a3f46; --image: #6ea4f4; --video: #f0a060; --serious: #ff7b6b;
  --mild: #98a0ab; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 80rem; background: var(--back);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
a { color: inherit; } small, dt, th, em { color: var(--soft); font-style: normal; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .6rem; }
.facts div { background: var(--card); border-radius: .5rem; padding: .5rem .8rem; }
.facts dt { font-size: .8rem; } .facts dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; overflow-wrap: normal; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td:first-child { overflow-wrap: anywhere; }
th { font-weight: 500; font-size: .8rem; }
.numbers td { font-variant-numeric: tabular-nums; }
details { border-left: .25rem solid var(--mild); background: var(--card); border-radius: .3rem;
  margin: .5rem 0; padding: .5rem .8rem; }
details.serious { border-color: var(--serious); }
summary { cursor: pointer; font-weight: 500; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem;
  margin: .6rem 0; }
figure { margin: 0; } figcaption { font-size: .85rem; }
img, .none { display: block; max-width: 100%; height: 7.5rem; object-fit: contain;
  border-radius: .25rem; }
.none { width: 7.5rem; padding: 3rem 1rem; border: 1px dashed var(--line); font-size: .8rem; }
.case { font-size: .85rem; } .group { grid-column: span 2; display: flex; flex-wrap: wrap;
  gap: .5rem; border: 1px solid var(--line); border-radius: .3rem; padding: .4rem; }
.group a { width: 9.5rem; } .group figcaption { width: 100%; }
.card { background: var(--card); border-radius: .4rem; padding: .5rem; }
.card:target { outline: 2px solid var(--image); }
.card small, .card q { display: block; } .card q { margin-top: .3rem; quotes: none; }
.tag { display: inline-block; margin-left: .3rem; padding: 0 .4rem; border-radius: .6rem;
  border: 1px solid var(--line); font-size: .75rem; text-decoration: none; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .25rem .8rem;
  align-items: center; }
.bars b { font-weight: 500; } .bars span { display: flex; height: .9rem; }
.bars i, .key { display: inline-block; } .key { width: .8rem; height: .8rem; }
i.image { background: var(--image); } i.video { background: var(--video); }
.strip { display: block; width: 14rem; height: .8rem; background: var(--line); }
.strip rect { fill: var(--video); }
"""

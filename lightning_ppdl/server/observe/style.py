"""The look of the status page: light and dark, at any width, with the fonts that are there."""

STYLE = """
:root{color-scheme:light dark;--ground:#f4f6f5;--card:#fff;--ink:#1b2724;--soft:#5c6b67;--line:#e1e7e4;
--green:#0b6e4f;--pale:#8fc2ae;--tint:#e6f2ed;--orange:#b23c0c;--glow:#fdf1ea;--shade:#eef1f0}
@media(prefers-color-scheme:dark){:root{--ground:#101614;--card:#18211e;--ink:#e6edea;--soft:#95a5a0;
--line:#2a3632;--green:#4ec99b;--pale:#2f7a5e;--tint:#19352b;--orange:#f4996b;--glow:#37241a;--shade:#141b19}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,"Noto Sans","Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;
-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:30px 24px 26px}
h1,h2,p,dl,dd,table{margin:0}
h1{font-size:21px;line-height:1.25;font-weight:650;letter-spacing:-.01em}
h2{font-size:12.5px;font-weight:600;color:var(--soft);letter-spacing:.02em}
bdi{overflow-wrap:anywhere}
code{font:.92em/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;color:var(--soft)}
header{display:flex;align-items:center;gap:14px;margin-bottom:20px}
header svg{width:42px;height:42px;flex:none}
header p{color:var(--soft)}
header .right{margin-left:auto;text-align:right}
header .right b{font-weight:600;color:var(--ink)}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px 20px;
min-width:0}
.grid2{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,340px);gap:16px;margin-top:16px;
align-items:start}
.side{display:grid;gap:16px}
.turn{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:14px 36px;align-items:center;
border-left:4px solid var(--line)}
.turn.waiting{border-left-color:var(--orange)}
.turn.open{border-left-color:var(--green)}
.turn .who{font-size:25px;line-height:1.25;font-weight:650;letter-spacing:-.015em;margin:3px 0 2px}
.turn .who+p,.turn li{color:var(--soft)}
.turn ul{margin:6px 0 0;padding:0;list-style:none;columns:2;column-gap:28px}
.turn li{break-inside:avoid}
.turn li bdi{color:var(--ink);font-weight:550}
.figures{display:flex;flex-wrap:wrap;gap:12px 32px}
.figures dt{font-size:12.5px;color:var(--soft)}
.figures dd{font-size:21px;font-weight:600;letter-spacing:-.01em;line-height:1.3;white-space:nowrap}
.figures small{display:block;font-size:12.5px;font-weight:400;color:var(--soft);letter-spacing:0}
.head{display:flex;justify-content:space-between;gap:12px;align-items:baseline;margin-bottom:12px}
.head p{font-size:13px;color:var(--soft);text-align:right}
.chart{display:grid;grid-template-columns:auto 1fr;gap:6px 10px}
.chart svg{width:100%;height:132px;display:block;overflow:visible}
.scale,.time{font-size:12px;color:var(--soft);display:flex;justify-content:space-between}
.scale{flex-direction:column;text-align:right;line-height:1;margin:-6px 0}
.time{grid-column:2}
.grid path{stroke:var(--line);stroke-width:1;vector-effect:non-scaling-stroke}
.bars rect{fill:var(--green)}
.bars .now{fill:var(--pale)}
.before{fill:var(--shade)}
.members{width:100%;border-collapse:collapse}
.members th{font-size:12.5px;font-weight:500;color:var(--soft);text-align:left;padding:0 0 6px}
.members td{padding:8px 0;border-top:1px solid var(--line);vertical-align:baseline}
.members th+th,.members td+td{padding-left:16px}
.members .number{text-align:right}
.members .heard{width:12em;white-space:nowrap}
.members .state{white-space:nowrap}
.members i{font-style:normal}
.many td{padding:4px 0}
.members .away{color:var(--soft)}
.dot{display:inline-block;width:8px;height:8px;border-radius:50%;margin-right:7px;background:var(--green)}
.away .dot{background:none;border:1.5px solid var(--soft)}
.tag{display:inline-block;margin-left:8px;padding:0 8px;border-radius:9px;background:var(--glow);
color:var(--orange);font-size:12px;line-height:19px;font-weight:550}
.more{padding-top:10px;color:var(--soft);font-size:13.5px;border-top:1px solid var(--line)}
.distribution{width:100%;border-collapse:collapse;font-size:13px}
.distribution th{font-weight:400;text-align:left;white-space:nowrap;padding:2.5px 12px 2.5px 0;
color:var(--soft)}
.distribution td{text-align:right;padding:2.5px 0 2.5px 10px;color:var(--soft);width:1%}
.distribution .bar{width:99%;padding:0}
.distribution svg{display:block;width:100%;height:9px;border-radius:3px}
.distribution rect{fill:var(--pale)}
.distribution .track{fill:var(--shade)}
.median th,.median td{color:var(--ink);font-weight:600}
.median rect{fill:var(--green)}
.reasons{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:7px 14px}
.reasons dd{text-align:right;font-weight:600}
.reasons code{display:block;font-size:12px;overflow-wrap:anywhere}
.empty{color:var(--soft);font-size:14px}
.nobody{text-align:center;padding:30px 16px 34px}
.nobody svg{width:92px;height:92px;opacity:.85}
.nobody p{color:var(--soft);max-width:30em;margin:6px auto 0}
.nobody .lead{font-size:17px;font-weight:600;color:var(--ink)}
footer{margin-top:20px;font-size:13px;color:var(--soft);display:flex;gap:10px 28px;
justify-content:space-between;flex-wrap:wrap}
footer p:first-child{flex:1 1 440px}
a{color:var(--green);text-decoration:none}
a:hover{text-decoration:underline}
@media(max-width:860px){.grid2{grid-template-columns:minmax(0,1fr)}.turn{grid-template-columns:minmax(0,1fr)}
.side{grid-template-columns:repeat(auto-fit,minmax(250px,1fr))}}
@media(max-width:560px){main{padding:18px 12px}header{flex-wrap:wrap}header .right{margin-left:0;
text-align:left;flex-basis:100%}section{padding:15px 14px 16px}.turn .who{font-size:21px}.turn ul{columns:1}
.members .state i{position:absolute;clip-path:inset(50%)}
.members .heard{width:auto;min-width:6.2em;white-space:normal}
.members th+th,.members td+td{padding-left:10px}
.figures{gap:12px 24px}.figures dd{font-size:18px}.head{flex-wrap:wrap}.head p{text-align:left}}
"""

#!/usr/bin/env bash
# The pages: whole HTML that asks nothing of a network, with what the run measured in it, texts escaped and cut between
# characters; a sweep's page from wherever its folder lies.
# Mutation seen caught: esp_html_text without the case for '<' fails "elements that are not closed".
. "$(dirname "$0")/../script.sh"
"$MAKE_TINY" "$work"
cd "$work"
python3 - <<'P'
import json
rows = [json.loads(l) for l in open('b.test.jsonl')]
rows[0]['prompt'] = '<b>&"' + 'ä' * 205 + rows[0]['prompt']
open('b.test.jsonl', 'w').write(''.join(json.dumps(r) + '\n' for r in rows))
P
cat >page.py <<'P'
import re, sys
from html.parser import HTMLParser
class Page(HTMLParser):
    void = {'meta', 'br', 'line', 'circle', 'rect', 'polyline'}
    loose = {'html', 'body', 'head', 'tr', 'th', 'td'}
    def __init__(self):
        super().__init__()
        self.open, self.text, self.count = [], [], {}
    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        for k, v in attrs:
            assert k not in ('src', 'href') and 'url(' not in (v or ''), (tag, k, v)
        if tag not in self.void | self.loose: self.open.append(tag)
    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
    def handle_endtag(self, tag):
        if tag not in self.void | self.loose: assert self.open and self.open.pop() == tag, 'elements that are not closed: ' + tag
    def handle_data(self, data): self.text.append(data)
def read(path):
    raw = open(path, encoding='utf-8').read()
    p = Page()
    p.feed(raw)
    assert not p.open, 'elements that are not closed: %s' % p.open
    assert 'script' not in p.count and 'http' not in raw and '@import' not in raw, 'asks for something'
    return p, ''.join(p.text)
P
"$ESPALIER" run recipe.yaml -q --output one train.max_steps=6 eval.every=2 eval.midway=seen eval.samples=2 checkpoint.every=0 data.sequence_len=480 || fail "the run"
"$ESPALIER" report one >/dev/null || fail "report"
python3 - <<'P' || fail "the page of a run"
import json
from page import read
p, text = read('one/report.html')
m = json.load(open('one/matrix.json'))
for row in m['rows']:
    for v in row: assert '%.3f' % v in text, v
for word in ('Score matrix', 'Scores over steps', 'Change per layer', 'Samples', 'Bytes held at most', 'stability gap', 'WC-ACC', 'optimizer'):
    assert word in text, word
assert '<b>&"' + 'ä' * 197 + '…' in text  # 400 bytes would end inside a character
for r in range(3):
    for s in json.load(open('one/samples/%d.json' % r)):
        if s['set'] == 'b' and r > 0: assert s['answer'][:40] in text, s
shown = [json.loads(l) for l in open('one/metrics.jsonl')]
marks = [l for l in shown if l.get('eval') in ('a', 'b')]
assert p.count['circle'] == len(marks), (p.count['circle'], len(marks))
P
"$ESPALIER" report one --text >text || fail "report as text"
grep -q 'stability gap' text && grep -q '^b .* to ' text && grep -q '^  at the end ' text || fail "the text: $(head -40 text)"

"$ESPALIER" sweep recipe.yaml --out sw --seeds 1,2 --set 'plain: |<small>: adapter.r=2' train.max_steps=2 checkpoint.every=0 -q >/dev/null || fail "the sweep"
mkdir elsewhere && mv sw elsewhere/
"$ESPALIER" report elsewhere/sw -o compared.html >/dev/null || fail "report of a sweep"
python3 - <<'P' || fail "the page of a sweep"
import json
from page import read
p, text = read('compared.html')
j = json.load(open('elsewhere/sw/sweep.json'))
for v in j['variants']:
    assert v['name'] in text and '%.3f ±%.3f' % (v['acc']['mean'], v['acc']['sd']) in text
assert 'Forgetting against memory' in text and '4runs finished' in text
rows = [json.load(open('elsewhere/%s/matrix.json' % r['dir']))['rows'] for r in j['runs'] if r['variant'] == 'plain']
assert len(rows) == 2
for i in range(3):
    assert '%.3f' % ((rows[0][i][0] + rows[1][i][0]) / 2) in text
P
"$ESPALIER" report elsewhere/sw --text | grep -q '^<small> ' || fail "a sweep as text"

# all tasks as one: the row has a name of its own wherever it is shown, and the answers are those before and after it
"$ESPALIER" sweep recipe.yaml --out all --seeds 1 --set 'one: continual.policy=joint | naive:' train.max_steps=3 eval.samples=1 checkpoint.every=0 -q >/dev/null || fail "the joint run"
joint=$(dirname "$(grep -l '"joint"' all/*/matrix.json)")
"$ESPALIER" matrix "$joint" | grep -q '^joint ' || fail "the row of a joint run: $("$ESPALIER" matrix "$joint")"
"$ESPALIER" report "$joint" -o joint.html >/dev/null && "$ESPALIER" report all -o joint_sweep.html >/dev/null || fail "report of a joint run"
JOINT=$joint python3 - <<'P' || fail "the page of a joint run"
import json, os, re
from page import read
run = os.environ['JOINT']
assert json.load(open(run + '/result.json'))['task_names'] == ['joint']
for page, rows in ('joint.html', ['base', 'joint']), ('joint_sweep.html', ['base', 'joint', 'base', '1 a', '2 b']):
    assert re.findall('<th class=row>([^<]+)</th>', open(page).read()) == rows, page
answers = [json.load(open(run + '/samples/%d.json' % r)) for r in (0, 2)]
text = read('joint.html')[1]
for s in answers[0] + answers[1]:
    if s['set'] == 'a': assert s['answer'][:40] in text, s
P

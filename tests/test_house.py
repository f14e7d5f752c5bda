"""The rules that keep the house in order: sync, direction of imports, budgets, cleanliness. Seconds, no training."""
import ast, json, re, statistics, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
NBS = sorted((ROOT/'nbs').glob('*.ipynb'))
LESSONS = [p for p in NBS if re.match(r'[01]\d', p.name)]
MODULES = sorted(p for p in (ROOT/'pdae_nb').glob('*.py') if not p.name.startswith('_'))
by_name = lambda p: p.stem

def cells(p): return json.loads(p.read_text())['cells']
def text(c): return ''.join(c['source'])
def code(p): return [c for c in cells(p) if c['cell_type'] == 'code']
def exported(c): return bool(re.search(r'^#\|\s*exports?\b', text(c), re.M))
def lines(s): return [l for l in s.split('\n') if l.strip() and not l.startswith('#|')]
def asserts(c): return bool(re.search(r'(?:^|;)\s*assert\b|\btest_(eq|ne|close|fail|is|sig|warns|shuffled|stdout)\w*\(', text(c), re.M))
def module_of(p): return next((m[1] for c in code(p) if (m := re.search(r'^#\|\s*default_exp\s+(\w+)', text(c), re.M))), None)
def run(*args): return subprocess.run(args, capture_output=True, text=True, cwd=ROOT)

OWNER = {m: p.stem for p in NBS if (m := module_of(p))}

def test_pyproject_is_rendered_from_settings():
    r = run(sys.executable, '.ci/sync_settings.py', '--check')
    assert r.returncode == 0, r.stdout

def test_nbdev_reads_what_settings_say():
    from configparser import ConfigParser
    from nbdev.config import get_config
    cp = ConfigParser(delimiters=['=']); cp.read(ROOT/'settings.ini')
    s, c = cp['DEFAULT'], get_config(ROOT)
    assert c.lib_name == s['lib_name'] and c.lib_path == ROOT/s['lib_path'] and c.nbs_path == ROOT/s['nbs_path']
    assert c.tst_flags == s['tst_flags'] and c.version == s['version']

def test_every_module_has_a_notebook():
    assert {p.stem for p in MODULES} == set(OWNER)

@pytest.mark.parametrize('p', MODULES, ids=by_name)
def test_imports_point_to_lower_numbers(p):
    tree = ast.parse(p.read_text())
    used = [n.module.split('.')[-1] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('pdae_nb'))]
    for m in used: assert OWNER[m] < OWNER[p.stem], f'{p.stem} imports {m}, which stands behind it'
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and any(a.name == '*' for a in n.names)], 'star import'

@pytest.mark.parametrize('p', NBS, ids=by_name)
def test_experiments_export_nothing(p):
    if re.match(r'2\d', p.name): assert not any(exported(c) for c in code(p))

def test_modules_are_pyflakes_clean():
    r = run(sys.executable, '-m', 'pyflakes', *map(str, MODULES))
    assert r.returncode == 0, r.stdout

@pytest.mark.parametrize('p', MODULES, ids=by_name)
def test_module_budgets(p):
    src = p.read_text()
    assert len([l for l in src.split('\n') if l.strip() and not l.startswith('# %%')]) <= 310, 'a module has at most 300 exported lines (and nbdev\'s own few)'
    for f in [n for n in ast.walk(ast.parse(src)) if isinstance(n, ast.FunctionDef)]:
        assert f.end_lineno - f.lineno < 45, f'{f.name} has {f.end_lineno - f.lineno + 1} lines'
        if not f.name.startswith('_'): assert f.args.args == [] or ast.get_docstring(f) or f.name in ('forward',) or _nested(f, src), f'{f.name} has no docstring'

def _nested(f, src): return any(f in ast.walk(o) and o is not f for o in ast.walk(ast.parse(src)) if isinstance(o, ast.FunctionDef)) or f.col_offset > 0

@pytest.mark.parametrize('p', LESSONS, ids=by_name)
def test_notebook_budgets(p):
    cs, cc = cells(p), code(p)
    n = [len(lines(text(c))) for c in cc]
    words = sum(len(re.findall(r'\w+', text(c))) for c in cs if c['cell_type'] == 'markdown')
    assert 35 <= len(cs) <= 85, f'{len(cs)} cells'
    assert statistics.median(n) <= 5.5, f'median {statistics.median(n)} lines'
    assert sum(k <= 15 for k in n) >= .88*len(n), f'{sum(k > 15 for k in n)} of {len(n)} code cells have more than 15 lines'
    assert 1.8 <= words/sum(n) <= 5, f'{words/sum(n):.1f} words per code line'

@pytest.mark.parametrize('p', LESSONS, ids=by_name)
def test_an_assertion_between_any_two_exported_functions(p):
    last = None
    for c in code(p):
        if exported(c) and (m := re.search(r'^(?:def|class)\s+([a-zA-Z]\w*)', text(c), re.M)):
            if last and re.search(rf'^@patch.*\n(?:.*\n)?def \w+\((?:self|cls): {last}\b', text(c), re.M): continue   # still the same class
            assert last is None, f'no assertion between {last} and {m[1]}'
            last = m[1]
        elif asserts(c): last = None

@pytest.mark.parametrize('p', NBS, ids=by_name)
def test_notebook_is_clean(p):
    nb, raw = json.loads(p.read_text()), p.read_text()
    import nbformat
    nbformat.validate(nbformat.reads(raw, as_version=4))
    assert not re.search(r'cuda:\d', raw), 'a device ordinal'
    assert 'widget-view+json' not in raw, 'a live widget was saved'
    assert not re.search(r'<{7} |>{7} ', raw), 'merge-conflict markers'
    outs = [o for c in nb['cells'] if c['cell_type'] == 'code' for o in c['outputs']]
    assert len(json.dumps(outs)) <= 410_000, 'outputs over 300 KB (400 KB in base64)'
    assert not re.search(r'\d+%\|[█▏▎▍▌▋▊▉ ]', json.dumps(outs, ensure_ascii=False)), 'progress-bar residue'
    assert not [o for o in outs if o['output_type'] == 'error'], 'an error was saved'
    for c in nb['cells']:
        if c['cell_type'] == 'markdown':
            for l in text(c).split('\n'): assert not (l.startswith('>') and re.search(r'[$\\]', l)), f'$ or \\ in the subtitle: {l}'

@pytest.mark.parametrize('p', LESSONS, ids=by_name)
def test_a_page_has_its_parts(p):
    md = '\n'.join(text(c) for c in cells(p) if c['cell_type'] == 'markdown')
    assert re.match(r'# \S', text(cells(p)[0])), 'a title'
    assert '<details>' in md and 'Try it' in md, 'exercises with folded answers'
    assert re.search(r'still lack', md), 'what we have, what we still lack'
    assert any('slider(' in text(c) for c in code(p)), 'a slider'
    assert any('image/png' in json.dumps(c['outputs']) for c in code(p)), 'a picture'

def test_importing_the_sampler_needs_little():
    heavy = 'datasets sklearn ipywidgets matplotlib PIL pyarrow torchvision'.split()
    r = run(sys.executable, '-c', f'import sys, pdae_nb.sample; print([m for m in {heavy} if m in sys.modules])')
    assert r.stdout.strip() == '[]', r.stdout + r.stderr

def test_nothing_imports_torchvision():
    assert not [p for p in [*MODULES, *NBS] if 'torchvision' in p.read_text()]

def test_tracked_files_are_small():
    r = run('git', 'ls-files', '-z')
    if r.returncode: pytest.skip('not a git checkout')
    big = [f for f in r.stdout.split('\0') if f and (ROOT/f).exists() and (ROOT/f).stat().st_size > 16e6]
    assert not big

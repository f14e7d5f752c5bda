"""Rules of the repository: generated files, layers, style, clean notebooks. No training."""

import ast
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml
from nbdev.config import get_config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'pdae_nb'
NOTEBOOKS = sorted((ROOT / 'nbs').rglob('*.ipynb'))
COURSE = sorted((ROOT / 'nbs/course').glob('*.ipynb'))
MODULES = sorted(path for path in PACKAGE.rglob('*.py') if not path.name.startswith('_'))

LAYERS = [
    'names decode splits labels readers workers tables cache pixels data logs files release '
    'processes theme plot curves learning_curves drawing diagrams',
    'layers memory forward denoise sampling solvers unet networks',
    'gap guidance weighting compiling',
    'model training store',
    'methods.dpm methods.classifier methods.attribute_classifier methods.pdae methods.label_pdae '
    'methods.diffae methods.scorevae methods.vae methods.latent',
    'pretrained adapters',
    'recipes version_1 parents own hub',
    'edit metrics evaluation feature_networks image_sets attributes picture_evaluation pictures',
    'commands traffic costs speed bench '
    'experiments.critical_stage experiments.training_efficiency experiments.autoencoding '
    'experiments.latent_space experiments.generation experiments.scorevae experiments.figures '
    'experiments.items experiments.runs experiments.precision experiments.prediction',
    'cli',
]
LAYER = {module: number for number, line in enumerate(LAYERS, 1) for module in line.split()}


def module_name(path: Path) -> str:
    return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def text(cell: dict) -> str:
    return ''.join(cell['source'])


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in cells(path) if cell['cell_type'] == 'code']


def is_exported(cell: dict) -> bool:
    return bool(re.match(r'#\|\s*export', text(cell)))


def owned_module(path: Path) -> str | None:
    "The module that a notebook owns, by its `default_exp`."
    for cell in code_cells(path):
        if match := re.search(r'^#\|\s*default_exp\s+([\w.]+)', text(cell), re.M):
            return match[1]
    return None


OWNER = {owned_module(path): path for path in NOTEBOOKS if owned_module(path)}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def imported_modules(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    "Each import statement of a module with the name of the package's module that it imports."
    package = module_name(path).split('.')[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parent = package[: len(package) - (node.level - 1)]
            yield node, '.'.join([*parent, node.module]) if node.module else '.'.join(parent)
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('pdae_nb.'):
            yield node, node.module.removeprefix('pdae_nb.')


def test_pyproject_is_rendered_from_settings():
    result = run(sys.executable, '.ci/sync_settings.py', '--check')
    assert result.returncode == 0, result.stdout


PAPERS = {  # arXiv number -> family names of the authors
    '2212.12990': ['Zhang', 'Zhao', 'Lin'],
    '2111.15640': ['Preechakul', 'Chatthee', 'Wizadwongsa', 'Suwajanakorn'],
    '2304.12141': ['Batzolis', 'Stanczuk', 'Schönlieb'],
}
# Of the schema of CFF 1.2.0 (https://github.com/citation-file-format/citation-file-format)
CFF_KEYS = """
    abstract authors cff-version commit contact date-released doi identifiers keywords license
    license-url message preferred-citation references repository repository-artifact
    repository-code title type url version
"""


def citation() -> dict:
    return yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))


def test_the_citation_file_is_valid():
    cff = citation()
    assert cff['cff-version'] == '1.2.0'
    assert {'authors', 'message', 'title'} <= set(cff) <= set(CFF_KEYS.split())
    assert cff['type'] == 'software'
    assert all('name' in author for author in cff['authors'])
    assert all(isinstance(word, str) for word in cff['keywords'])
    for reference in cff['references']:
        assert {'type', 'title', 'authors'} <= set(reference)
        assert reference['type'] == 'article'
        assert isinstance(reference['year'], int)
        for author in reference['authors']:
            assert set(author) == {'given-names', 'family-names'}


def test_the_citation_file_names_the_papers():
    authors = {}
    for reference in citation()['references']:
        number = reference['url'].removeprefix('https://arxiv.org/abs/')
        assert reference['identifiers'] == [dict(type='other', value=f'arXiv:{number}')]
        authors[number] = [author['family-names'] for author in reference['authors']]
    assert authors == PAPERS


def test_the_version_is_the_same_in_all_files():
    "`.ci/sync_settings.py` writes it."
    version = get_config(ROOT).version
    assert str(citation()['version']) == version
    assert importlib.import_module('pdae_nb').__version__ == version
    changes = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    headings = re.findall(r'^## \[(.*?)\]', changes, re.M)
    assert headings[0] == 'Unreleased' or headings[0] == version
    assert version in headings


def test_the_change_log_has_the_form_of_keep_a_changelog():
    changes = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    kinds = {'Added', 'Changed', 'Deprecated', 'Removed', 'Fixed', 'Security'}
    assert set(re.findall(r'^### (.*)$', changes, re.M)) <= kinds


def test_nbdev_reads_what_settings_say():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    settings = parser['DEFAULT']
    config = get_config(ROOT)
    assert config.lib_name == settings['lib_name']
    assert config.lib_path == ROOT / settings['lib_path']
    assert config.nbs_path == ROOT / settings['nbs_path']
    assert config.tst_flags == settings['tst_flags']
    assert config.version == settings['version']


def test_ruff_finds_nothing():
    paths = ['pdae_nb', 'tests', '.ci']
    ruff = [sys.executable, '-m', 'ruff']
    check = run(*ruff, 'check', '--output-format', 'concise', *paths)
    assert check.returncode == 0, check.stdout
    layout = run(*ruff, 'format', '--check', *paths)
    assert layout.returncode == 0, layout.stdout


def test_exported_cells_are_formatted():
    result = run(sys.executable, '.ci/format_cells.py', '--check')
    assert result.returncode == 0, result.stdout


def test_each_module_is_owned_by_one_notebook():
    assert {module_name(path) for path in MODULES} == set(OWNER)
    owners = [owned_module(path) for path in NOTEBOOKS if owned_module(path)]
    assert len(owners) == len(set(owners))


def test_the_table_of_layers_is_complete():
    assert {module_name(path) for path in MODULES} == set(LAYER)


@pytest.mark.parametrize('path', MODULES, ids=module_name)
def test_imports_follow_the_layers(path):
    module = module_name(path)
    for node, imported in imported_modules(path):
        names = [alias.name for alias in node.names]
        assert '*' not in names, f'line {node.lineno}: star import'
        assert imported in LAYER, f'line {node.lineno}: {imported} is no module of the package'
        assert LAYER[imported] <= LAYER[module], f'line {node.lineno}: {imported} is a higher layer'


def test_modules_import_each_other_without_cycles():
    imports = {module_name(path): set() for path in MODULES}
    for path in MODULES:
        imports[module_name(path)] |= {imported for _, imported in imported_modules(path)}
    while imports:
        leaves = {module for module, imported in imports.items() if not imported & set(imports)}
        assert leaves, f'a cycle joins {sorted(imports)}'
        imports = {module: imports[module] for module in set(imports) - leaves}


def test_only_the_command_line_imports_experiments_and_only_inside_functions():
    for path in MODULES:
        module = module_name(path)
        if module.startswith('experiments.'):
            continue
        for node, imported in imported_modules(path):
            if imported.startswith('experiments.'):
                assert module == 'cli', f'{module} imports {imported}'
                assert node.col_offset > 0, f'cli imports {imported} at its top'


def public_functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding='utf-8'))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    owners = [tree, *(node for node in classes if not node.name.startswith('_'))]
    functions = [node for owner in owners for node in owner.body]
    functions = [node for node in functions if isinstance(node, ast.FunctionDef)]
    return [node for node in functions if not node.name.startswith('_')]


@pytest.mark.parametrize('path', MODULES, ids=module_name)
def test_public_functions_have_docstrings(path):
    silent = [node.name for node in public_functions(path) if not ast.get_docstring(node)]
    silent = [name for name in silent if name != 'forward']
    assert not silent


def required_packages() -> set[str]:
    "Names of the distributions that the package requires, optional ones included."
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    settings = parser['DEFAULT']
    words = ' '.join(settings[key] for key in settings if key.endswith('requirements')).split()
    return {re.split(r'[<>=~!]', word)[0].lower().replace('_', '-') for word in words}


OPTIONAL = {'torchmetrics', 'torch_fidelity', 'lpips'}  # looked for at run time, with a clear error


def test_every_imported_package_is_declared():
    imported = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split('.')[0])
    imported -= set(sys.stdlib_module_names) | OPTIONAL | {'pdae_nb'}
    distributions = importlib.metadata.packages_distributions()
    missing = [
        name
        for name in sorted(imported)
        if not {d.lower().replace('_', '-') for d in distributions[name]} & required_packages()
    ]
    assert not missing


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    raw = path.read_text(encoding='utf-8')
    nbformat.validate(nbformat.reads(raw, as_version=4))
    assert not re.search(r'cuda:\d', raw), 'a device ordinal'
    assert 'widget-view+json' not in raw, 'a live widget was saved'
    assert not re.search(r'<{7} |>{7} ', raw), 'merge-conflict markers'
    outputs = [output for cell in code_cells(path) for output in cell['outputs']]
    assert len(json.dumps(outputs)) <= 1_500_000, 'outputs over 1.5 MB of JSON'
    bars = re.search(r'\d+%\|[█▏▎▍▌▋▊▉ ]', json.dumps(outputs, ensure_ascii=False))
    assert not bars, 'a progress bar was saved'
    assert not [output for output in outputs if output['output_type'] == 'error']


# Folders of the pages that state the size of their stored outputs.
SIZE_STATED = ['experiments', 'toolbox']
SIZED = [path for path in NOTEBOOKS if path.parent.name in SIZE_STATED]


@pytest.mark.parametrize('path', SIZED, ids=lambda path: path.stem)
def test_a_page_with_pictures_states_the_size_of_its_outputs(path):
    outputs = [output for cell in code_cells(path) for output in cell['outputs']]
    kinds = {kind for output in outputs for kind in output.get('data', {})}
    if not [kind for kind in kinds if not kind.startswith('text/')]:
        return
    top = '\n'.join(text(cell) for cell in cells(path)[:4])
    assert 'PDAE_NB_SIZE' in top or 'stored outputs' in top


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_subtitles_hold_no_formula(path):
    "nbdev copies the subtitle into the module's docstring."
    for cell in cells(path):
        if cell['cell_type'] == 'markdown':
            for line in text(cell).split('\n'):
                assert not (line.startswith('>') and re.search(r'[$\\]', line)), line


# Lessons of the course. `13_edit` holds the functions; its text is not written yet.
LESSONS = [path for path in COURSE if path.stem != '13_edit']


@pytest.mark.parametrize('path', LESSONS, ids=lambda path: path.stem)
def test_a_page_has_its_parts(path):
    markdown = [text(cell) for cell in cells(path) if cell['cell_type'] == 'markdown']
    prose = '\n'.join(markdown)
    assert re.match(r'# \S', text(cells(path)[0])), 'a title'
    assert '<details>' in prose, 'exercises with folded answers'
    assert 'Try it' in prose, 'exercises'
    assert 'still lack' in prose, 'what is still missing'
    code = code_cells(path)
    assert any('slider(' in text(cell) for cell in code), 'a slider'
    assert any('image/png' in json.dumps(cell['outputs']) for cell in code), 'a picture'


def is_a_record(node: ast.stmt) -> bool:
    "A class that only holds values: a dataclass, a named tuple, a protocol."
    if not isinstance(node, ast.ClassDef):
        return False
    about = [ast.unparse(part) for part in [*node.bases, *node.decorator_list]]
    return any(re.match(r'NamedTuple|Protocol|dataclass', part) for part in about)


def exported_names(cell: dict) -> list[str]:
    "Public functions and classes that an exported cell defines, records aside."
    defined = [
        node
        for node in ast.parse(text(cell)).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    return [node.name for node in defined if node.name[0] != '_' and not is_a_record(node)]


@pytest.mark.parametrize('path', LESSONS, ids=lambda path: path.stem)
def test_an_assertion_between_any_two_exported_cells(path):
    untested = None
    for cell in code_cells(path):
        if is_exported(cell):
            for name in exported_names(cell)[:1]:
                assert untested is None, f'no assertion between {untested} and {name}'
            untested = next(reversed(exported_names(cell)), untested)
        elif re.search(r'\bassert\b|\btest_\w+\(', text(cell)):
            untested = None
    assert untested is None, f'no assertion after {untested}'


def test_importing_the_sampler_needs_little():
    heavy = [
        'datasets',
        'sklearn',
        'ipywidgets',
        'matplotlib',
        'IPython',
        'PIL',
        'pyarrow',
        'scipy',
    ]
    code = f'import sys, pdae_nb.sampling; print([m for m in {heavy} if m in sys.modules])'
    result = run(sys.executable, '-c', code)
    assert result.stdout.strip() == '[]', result.stdout + result.stderr


GLOBAL_SETTINGS = """
import importlib, torch
def settings():
    return (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.benchmark, torch.get_default_dtype(), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.initial_seed())
torch.manual_seed(123)
before = settings()
for module in {modules}:
    importlib.import_module('pdae_nb.' + module)
assert settings() == before, (before, settings())
"""


def test_importing_changes_no_global_setting():
    modules = [module_name(path) for path in MODULES]
    result = run(sys.executable, '-c', GLOBAL_SETTINGS.format(modules=modules))
    assert result.returncode == 0, result.stderr


def test_nothing_imports_torchvision():
    for path in [*MODULES, *NOTEBOOKS]:
        assert 'torchvision' not in path.read_text(encoding='utf-8'), path


def test_tracked_files_are_small():
    listed = run('git', 'ls-files', '-z')
    if listed.returncode:
        pytest.skip('not a git checkout')
    paths = [ROOT / name for name in listed.stdout.split('\0') if name]
    big = [path for path in paths if path.exists() and path.stat().st_size > 25e6]
    assert not big

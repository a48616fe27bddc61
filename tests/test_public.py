"""The public face: `import perl_jax` gives a few names, costs nothing, and each says what it takes and gives."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import perl_jax

SECTION = re.compile(r'^(Args|Attributes|Returns|Raises):\n((?:  .+\n|\n)+)', re.MULTILINE)

LINEN = {'setup'}  # a method that linen calls


def sections(value):
    """The parts of a Google-style docstring by their headings."""
    return dict(SECTION.findall(inspect.getdoc(value) + '\n'))


def wrong(text, names):
    """Those that a section has no entry for, and entries that are none of them."""
    entries = re.findall(r'^  \**(\w+):', text, re.MULTILINE)
    return set(names) ^ set(entries)


def test_the_three_lists_of_names_agree():
    block = next(
        node for node in ast.parse(pathlib.Path(perl_jax.__file__).read_text()).body if isinstance(node, ast.If)
    )
    typed = {
        alias.asname or alias.name: f'{node.module.removeprefix("perl_jax.")}:{alias.name}'
        for node in block.body
        for alias in node.names
    }
    assert typed == perl_jax._LOCATIONS
    assert set(perl_jax.__all__) == typed.keys()
    assert len(perl_jax.__all__) == len(set(perl_jax.__all__))


def test_names_come_when_they_are_asked_for():
    code = """
import sys, perl_jax
heavy = {'jax', 'numpy', 'tensorflow'} & {*sys.modules}
perl_jax.bind
print(heavy, *dir(perl_jax))
"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.startswith('set()')
    assert set(perl_jax.__all__) < set(out.split())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'perl_jax' has no attribute 'lora'"):
        perl_jax.lora  # noqa: B018


def test_folders_and_modules_are_imported_as_ever():
    from perl_jax import masked, rl  # noqa: PLC0415
    from perl_jax.models import lora  # noqa: PLC0415

    assert perl_jax.rl is rl and perl_jax.masked is masked and perl_jax.bind is lora.bind


def test_the_reference_has_every_name_once():
    """docs/reference/api/; `make docs` builds it, and fails on a name that is not there."""
    pages = (pathlib.Path(__file__).parents[1] / 'docs/reference/api').glob('*.md')
    named = re.findall(r'^::: perl_jax\.(\w+)$', '\n'.join(page.read_text() for page in pages), re.MULTILINE)
    assert sorted(named) == sorted(perl_jax.__all__)


def test_the_nav_has_every_page():
    """`make docs` fails on a page that it has not; this says so without mkdocs."""
    root = pathlib.Path(__file__).parents[1]
    listed = set(re.findall(r': (\S+\.md)$', (root / 'mkdocs.yml').read_text(), re.MULTILINE))
    assert listed == {str(page.relative_to(root / 'docs')) for page in (root / 'docs').rglob('*.md')}


def test_every_page_that_is_named_is_there():
    """mkdocs checks the links between pages, and sees neither those of the README nor what code and gin files name."""
    root = pathlib.Path(__file__).parents[1]
    folders = 'perl_jax', 'tasks', 'gin', 'benchmarks', 'launch', 'examples', 'tests', 'docs'
    files = [*root.glob('*.md'), *root.glob('*.txt')]
    files += [path for name in folders for path in (root / name).rglob('*.*')]
    named = {
        (page, path.name)
        for path in files
        if path.suffix in ('.md', '.txt', '.py', '.gin', '.sh')
        for page in re.findall(r'(?<![\w/])docs/[\w/]+\.(?:md|png|json|csv)', path.read_text())
    }
    missing = sorted(f'{file}: {page}' for page, file in named if not (root / page).exists())
    assert not missing, '\n'.join(['', *missing])


@pytest.mark.parametrize('page', ['README.md', 'CONTRIBUTING.md'])
def test_links_of_pages_outside_the_site_lead_somewhere(page):
    """Index sites and GitHub show them, and mkdocs, which checks the links of docs/, never reads them."""
    root = pathlib.Path(__file__).parents[1]
    links = re.findall(r'\]\(((?!https?:)[^)#]+)(?:#([^)]+))?\)', (root / page).read_text())
    assert links
    for path, anchor in links:
        assert (root / path).exists(), path
        headings = re.findall(r'^#+ (.+)$', (root / path).read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings]
        assert not anchor or anchor in slugs, f'{path}#{anchor}'


@pytest.mark.parametrize('name', perl_jax.__all__)
def test_docstrings_say_all(name):
    """Args, Returns, Attributes: whoever has the name alone need not read the code."""
    value = getattr(perl_jax, name)
    assert value.__doc__, f'{name} has no docstring'
    said = sections(value)
    if inspect.isclass(value):
        if not issubclass(value, Exception):
            own = [field for field in inspect.get_annotations(value) if field not in ('parent', 'name')]
            assert not wrong(said.get('Attributes', ''), own), f'{name}: mend Attributes'
        functions = {key: m for key, m in vars(value).items() if inspect.isfunction(m)}
        methods = {key: m for key, m in functions.items() if m.__module__ == value.__module__}
        undocumented = {key for key, m in methods.items() if not m.__doc__ and not key.startswith('_')} - LINEN
        assert not undocumented, f'{name}: these methods have no docstring'
        for key, method in methods.items():
            if text := sections(method).get('Args') if method.__doc__ else None:
                parameters = inspect.signature(method).parameters.keys() - {'self'}
                assert not wrong(text, parameters), f'{name}.{key}: mend Args'
    else:
        parameters = inspect.signature(value).parameters
        assert not wrong(said.get('Args', ''), parameters), f'{name}: mend Args'
        assert 'Returns' in said or value.__annotations__['return'] == 'None', f'{name}: no Returns'

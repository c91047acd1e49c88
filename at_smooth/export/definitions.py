"""The source of classes and functions, with everything that they use of their modules, for a file that stands alone."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any

#: Never written out: whoever loads the model has the first, and its relatives need it too.
_FRAMEWORKS = ("torch", "torchvision")

#: What an exported model must not need; a class that reaches it is the plugin, not the network.
_REFUSED = "pydantic"

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class UnwritableError(Exception):
    """Something cannot be written as code; the message says what, and why."""


class Definitions:
    """Source text gathered from modules: definitions, those that they reach by name, and the imports that they need.

    Names are followed without regard to scope, so that too much may come along, but not too little.

    Args:
        own: Top-level packages whose source is written out although they are installed. So is what is not installed,
            such as modules of the working directory; anything else is imported.
        reserved: Names that the file needs for itself.
    """

    def __init__(self, own: Collection[str], reserved: Collection[str] = ()) -> None:
        self._own = {*own, "at_smooth"} - {*_FRAMEWORKS}
        self._installed = importlib.metadata.packages_distributions()
        self._modules: dict[str, _Module] = {}
        self._origin = dict.fromkeys(reserved, "this file")
        self._imports: set[str] = set()
        self._brought: set[str] = set()
        #: Packages beside torch and the standard library that the text imports.
        self.requirements: set[str] = set()

    def name_of(self, thing: Any) -> str:
        """How the text calls a class or function; its definition comes along.

        Raises:
            UnwritableError: It has no name, or no source.
        """
        torch_nn = sys.modules["torch.nn"]
        name = str(getattr(thing, "__qualname__", getattr(thing, "__name__", "")))
        if name and getattr(torch_nn, name, None) is thing:
            return f"nn.{name}"
        if name and getattr(torch_nn.functional, name, None) is thing:
            return f"nn.functional.{name}"
        if name and getattr(sys.modules["torch"], name, None) is thing:
            return f"torch.{name}"
        if getattr(builtins, name, None) is thing:
            return name
        module = getattr(thing, "__module__", None)
        if not name or "<" in name or module is None:
            raise UnwritableError(f"{thing!r} is defined inside a function; define it at the top of its module")
        top = name.partition(".")[0]
        if self._written_out(module):
            self._follow(self._module(module), top)
        else:
            self.bring(top, f"{module}.{top}", f"from {module} import {top}")
        return name

    def bring(self, name: str, target: str, line: str) -> None:
        """Import something.

        Args:
            name: What it is called in the text.
            target: What it is, as a dotted path.
            line: The statement.
        """
        self._claim(name, target)
        plain = line.startswith("import ") and " as " not in line  # `import a` and `import a.b` bind one name
        if plain or name not in self._brought:
            self._imports.add(line)
            self._brought.add(name)
        root = line.split()[1].partition(".")[0]
        if root not in sys.stdlib_module_names and root != "torch":
            self.requirements.add(root)

    def text(self) -> tuple[str, str]:
        """The import lines, and the definitions in the order of their modules."""
        lines = sorted(self._imports, key=lambda line: (line.startswith("from"), line))
        standard = [line for line in lines if line.split()[1].partition(".")[0] in sys.stdlib_module_names]
        others = [line for line in lines if line not in standard]
        imports = "\n\n".join("\n".join(group) for group in (standard, others) if group)
        blocks = [block for module in self._modules.values() for block in module.blocks()]
        return imports, "\n\n\n".join(blocks)

    def _claim(self, name: str, origin: str) -> None:
        if self._origin.setdefault(name, origin) != origin:
            raise UnwritableError(f"'{name}' means both {self._origin[name]} and {origin}; rename one of them")

    def _written_out(self, module: str) -> bool:
        root = module.partition(".")[0]
        if root == _REFUSED:
            raise UnwritableError(f"its code reaches {_REFUSED}, which belongs to the plugin and not to the network")
        if root in self._own:
            return True
        return root not in (*_FRAMEWORKS, *sys.stdlib_module_names, *self._installed)

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            self._modules[name] = _Module(importlib.import_module(name))
        return self._modules[name]

    def _follow(self, module: _Module, name: str) -> None:
        """Keep what a name stands for in a module, and what that uses in turn."""
        if name not in module.bound:
            for source in module.stars:
                self._follow_star(module, source, name)
            return
        for position in module.bound[name]:
            statement = module.statements[position]
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self._follow_import(module, statement, name)
                continue
            if position in module.kept or _is_for_type_checkers(statement):
                continue
            module.kept.add(position)
            for bound in _names_bound(statement):
                self._claim(bound, f"{module.name}.{bound}")
            self._look_at_inner_imports(module, statement)
            for used in sorted(_names_used(statement)):
                self._follow(module, used)
        self._modules[module.name] = self._modules.pop(module.name)  # after those that it imports from

    def _follow_import(self, module: _Module, statement: ast.Import | ast.ImportFrom, name: str) -> None:
        for alias in statement.names:
            called = alias.asname or (alias.name if isinstance(statement, ast.ImportFrom) else _root(alias.name))
            if called != name:
                continue
            renamed = f" as {alias.asname}" if alias.asname else ""
            if isinstance(statement, ast.Import):
                self._refuse_whole(alias.name, module)
                target = alias.name if alias.asname else _root(alias.name)
                self.bring(name, target, f"import {alias.name}{renamed}")
                continue
            base = module.absolute(statement)
            if not self._written_out(base):
                self.bring(name, f"{base}.{alias.name}", f"from {base} import {alias.name}{renamed}")
                continue
            value = getattr(importlib.import_module(base), alias.name, None)
            if isinstance(value, ModuleType):
                self._refuse_whole(value.__name__, module)
            home = getattr(
                value, "__module__", base
            )  # `from at_smooth import X` names a package that only passes it on
            source = self._module(home if isinstance(value, type) or inspect.isfunction(value) else base)
            if alias.name not in source.bound:
                source = self._module(base)
            self._follow(source, alias.name)
            if name != alias.name:
                self._claim(name, f"{source.name}.{alias.name}")
                source.aliases[name] = alias.name

    def _follow_star(self, module: _Module, source: str, name: str) -> None:
        if hasattr(importlib.import_module(source), name):
            if self._written_out(source):
                self._follow(self._module(source), name)
            else:
                self.bring(name, f"{source}.{name}", f"from {source} import {name}")

    def _look_at_inner_imports(self, module: _Module, statement: ast.stmt) -> None:
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom):
                self._refuse_whole(module.absolute(node), module)
                self._require(module.absolute(node))
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self._refuse_whole(alias.name, module)
                    self._require(alias.name)

    def _require(self, name: str) -> None:
        if _root(name) not in (*sys.stdlib_module_names, "torch"):
            self.requirements.add(_root(name))

    def _refuse_whole(self, name: str, module: _Module) -> None:
        if self._written_out(name):
            raise UnwritableError(
                f"{module.name} imports {name} as a whole or inside a function; "
                f"import what it uses at the top of the module, by 'from {name} import ...'"
            )


class _Module:
    """The top-level statements of a module, which of them are kept, and under what other names."""

    def __init__(self, module: ModuleType) -> None:
        self.name = module.__name__
        self._package = self.name if hasattr(module, "__path__") else self.name.rpartition(".")[0]
        try:
            source = inspect.getsource(module)
        except (OSError, TypeError):
            raise UnwritableError(f"the source of {self.name} is not there") from None
        self._lines = source.splitlines()
        self.statements = ast.parse(source).body
        self.kept: set[int] = set()
        self.aliases: dict[str, str] = {}
        self.bound: dict[str, list[int]] = {}
        self.stars: list[str] = []
        for position, statement in enumerate(self.statements):
            for name in _names_bound(statement):
                self.bound.setdefault(name, []).append(position)
            if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
                self.stars.append(self.absolute(statement))

    def absolute(self, statement: ast.ImportFrom) -> str:
        """The module that a statement imports from."""
        return importlib.util.resolve_name("." * statement.level + (statement.module or ""), self._package)

    def blocks(self) -> Iterator[str]:
        """The text of the kept statements, with the comments right above them; short ones stay together."""
        together: list[str] = []
        for position in sorted(self.kept):
            statement = self.statements[position]
            first = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))])
            while first > 1 and self._lines[first - 2].startswith("#"):
                first -= 1
            text = "\n".join(self._lines[first - 1 : statement.end_lineno])
            if not isinstance(statement, _DEFINITIONS):
                together.append(text)
                continue
            if together:
                yield "\n".join(together)
                together = []
            yield text
        together += [f"{alias} = {name}" for alias, name in self.aliases.items()]
        if together:
            yield "\n".join(together)


def _names_bound(statement: ast.stmt) -> set[str]:
    """The names that a top-level statement gives a meaning, or changes."""
    if isinstance(statement, _DEFINITIONS):
        return {statement.name}
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Import):
            names |= {alias.asname or _root(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, _DEFINITIONS):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            holder: ast.expr = node
            while isinstance(holder, ast.Attribute | ast.Subscript):  # `Net.scale = 2` changes Net
                holder = holder.value
            if isinstance(holder, ast.Name):
                names.add(holder.id)
    return names


def _names_used(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _is_for_type_checkers(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)


def _root(name: str) -> str:
    return name.partition(".")[0]

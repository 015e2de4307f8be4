"""What the subjects work on: a tree of npm packages, a large file, and real projects, made once for all rounds."""
import shutil
from pathlib import Path

from .machine import run, sh, warm

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "scripts/quickstart-project"
# Pure Rust and among forkvol's own dependencies: what building forkvol has fetched is enough.
CRATES = ["clap", "ignore", "jiff", "serde", "serde_json", "tar", "thiserror", "toml"]

APP = """
#[derive(clap::Parser, serde::Serialize)]
struct Arguments { folder: std::path::PathBuf }

fn main() {
    let arguments: Arguments = clap::Parser::parse();
    let files = ignore::Walk::new(&arguments.folder).filter_map(Result::ok).count();
    println!("{} {} {}", serde_json::json!({ "files": files }), toml::to_string(&arguments).unwrap_or_default(), jiff::Timestamp::now());
}
"""

C_FILE = """#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "all.h"
"""

C_FUNCTION = """
struct node_{n}_{m} {{ struct node_{n}_{m} *next; char name[{size}]; int value; }};
int function_{n}_{m}(const char *text, int count) {{
    struct node_{n}_{m} *head = NULL;
    for (int i = 0; i < count; i++) {{
        struct node_{n}_{m} *made = malloc(sizeof *made);
        if (!made) abort();
        snprintf(made->name, sizeof made->name, "%s %d", text, i * {m});
        made->value = (int)strlen(made->name) + i;
        made->next = head;
        head = made;
    }}
    int sum = 0;
    while (head) {{ struct node_{n}_{m} *next = head->next; sum += head->value; free(head); head = next; }}
    return sum;
}}
"""

MAKEFILE = """
objects := $(patsubst %.c,%.o,$(wildcard *.c))
program: $(objects)
\tgcc -o $@ $^
%.o: %.c all.h
\tgcc -O1 -Wall -c -o $@ $<
"""


class Material:
    """Files in `folder`; whoever measures with one warms it up before."""

    def __init__(self, folder, copies, large_bytes, talk):
        self.folder = folder
        talk("making the tree")
        self.npm_cache = folder / "npm-cache"
        self.project = folder / "project"
        shutil.copytree(QUICKSTART, self.project)
        sh(f"npm ci --no-audit --no-fund --loglevel=error --cache '{self.npm_cache}'", self.project)
        modules = folder / "node_modules"
        (self.project / "node_modules").rename(modules)
        self.tree = folder / "tree.tar"
        self.portion = folder / "portion.tar"
        self.entries = self.pack_tree(modules, copies)
        self.packed_bytes = int(sh(f"zstd -3 -q -c '{self.tree}' | wc -c"))
        talk("making the large file")
        self.large = folder / "large"
        self.large_bytes = large_bytes
        run(["dd", "if=/dev/urandom", f"of={self.large}", "bs=1M", f"count={large_bytes >> 20}", "status=none"])
        self.modules = modules
        self.programs = None

    def pack_tree(self, modules, copies):
        """The dependencies, several times; each copy's sources differ in their first line. Returns how many entries it has."""
        tree = self.folder / "tree"
        tree.mkdir()
        for number in range(copies):
            copy = tree / f"copy{number}"
            shutil.copytree(modules, copy, symlinks=True)
            for path in copy.rglob("*.js"):
                if path.is_file() and not path.is_symlink():
                    path.write_bytes(b"// %d\n" % number + path.read_bytes())
        entries = int(sh(f"find '{tree}' | wc -l"))
        run(["tar", "c", "-C", tree, "-f", self.tree, "."])
        run(["tar", "c", "-C", tree / "copy0", "-f", self.portion, "@mui"])
        run(["rm", "-rf", tree])
        return entries

    def warm(self):
        warm(self.tree)

    def make_programs(self, cargo_home, sources, talk):
        """Everything that the real programs need, as they would find it in the volumes of a CI job."""
        talk("making the projects")
        home = self.folder / "programs"
        home.mkdir()
        shutil.copytree(self.project, home / "npm-project")
        shutil.copytree(self.npm_cache, home / "npm-cache")
        self.make_app(home, cargo_home)
        self.make_c(home / "c", sources)
        repository = self.folder / "repository"
        shutil.copytree(self.modules, repository, symlinks=True)
        sh(
            "git init -q && git add -Af . && git -c user.name=bench -c user.email=bench@localhost commit -qm all && "
            f"git clone -q --bare . '{home}/repository.git'",
            repository,
        )
        run(["rm", "-rf", repository])
        self.programs = self.folder / "programs.tar"
        run(["tar", "c", "-C", home, "-f", self.programs, "."])
        run(["rm", "-rf", home])

    def make_app(self, home, cargo_home):
        app = home / "app"
        (app / "src").mkdir(parents=True)
        wanted = sh(r"sed -n '/^\[dependencies\]/,/^\[dev-dependencies\]/p' Cargo.toml", ROOT).splitlines()
        lines = [line for line in wanted if line.split(" ")[0] in CRATES]
        (app / "Cargo.toml").write_text('[package]\nname = "app"\nversion = "0.1.0"\nedition = "2024"\n\n[dependencies]\n' + "\n".join(lines) + "\n")
        (app / "src/main.rs").write_text(APP)
        shutil.copy(ROOT / "Cargo.lock", app)
        for part in ("registry/index", "registry/cache"):
            shutil.copytree(cargo_home / part, home / "cargo" / part)
        if (cargo_home / "config.toml").exists():
            shutil.copy(cargo_home / "config.toml", home / "cargo")

    def make_c(self, folder, sources):
        folder.mkdir()
        declared = []
        for n in range(sources):
            functions = [C_FUNCTION.format(n=n, m=m, size=64 + m) for m in range(20)]
            declared += [f"int function_{n}_{m}(const char *, int);" for m in range(20)]
            (folder / f"part{n}.c").write_text(C_FILE + "".join(functions))
        (folder / "all.h").write_text("\n".join(declared) + "\n")
        calls = "".join(f'    sum += function_{n}_0("x", 3);\n' for n in range(sources))
        (folder / "main.c").write_text(C_FILE + "int main(void) {\n    int sum = 0;\n" + calls + '    printf("%d\\n", sum);\n    return 0;\n}\n')
        (folder / "Makefile").write_text(MAKEFILE)

//! What the caches of well-known tools are, and what in a folder tells that a tool is used. Looks at names only.

use std::path::Path;

use super::names::Scope;
use super::yaml::{Fault, Place};
use super::{Cache, keys};
use crate::cli::values;

/// A file that tells of a tool, unless one of the others lies beside it.
type Sign = (&'static str, &'static [&'static str]);

/// A tool and its cache.
#[derive(Debug)]
pub struct Preset {
    /// Also the name of its volume.
    pub name: &'static str,
    signs: &'static [Sign],
    /// As a file of caches would write them.
    pub paths: &'static [&'static str],
    /// Files whose content says whether the cache is what the job wants.
    locks: &'static [&'static str],
    /// Variables without which the tool does not use the cache well.
    pub environment: &'static [(&'static str, &'static str)],
}

const LOCKED_OTHERWISE: &[&str] = &["yarn.lock", "pnpm-lock.yaml", "bun.lock", "bun.lockb"];

/// All tools that are known, in the order in which they are offered.
pub const PRESETS: [Preset; 14] = [
    Preset {
        name: "npm",
        signs: &[
            ("package-lock.json", &[]),
            ("npm-shrinkwrap.json", &[]),
            ("package.json", LOCKED_OTHERWISE),
        ],
        paths: &["${npm_config_cache:-~/.npm}"],
        locks: &["package-lock.json", "npm-shrinkwrap.json"],
        environment: &[],
    },
    Preset {
        name: "yarn",
        signs: &[("yarn.lock", &[])],
        // Of the first Yarn, and of the later ones.
        paths: &["${YARN_CACHE_FOLDER:-~/.cache/yarn}", "~/.yarn/berry/cache"],
        locks: &["yarn.lock"],
        environment: &[],
    },
    Preset {
        name: "pnpm",
        signs: &[("pnpm-lock.yaml", &[])],
        paths: &["~/.local/share/pnpm/store"],
        locks: &["pnpm-lock.yaml"],
        // Else it makes a store of its own on the filesystem of the project.
        environment: &[("npm_config_store_dir", "~/.local/share/pnpm/store")],
    },
    Preset {
        name: "pip",
        signs: &[
            ("requirements.txt", &["uv.lock"]),
            ("Pipfile.lock", &[]),
            ("setup.py", &["uv.lock"]),
        ],
        paths: &["${PIP_CACHE_DIR:-~/.cache/pip}"],
        locks: &["requirements.txt", "Pipfile.lock"],
        environment: &[],
    },
    Preset {
        name: "uv",
        signs: &[("uv.lock", &[])],
        paths: &["${UV_CACHE_DIR:-~/.cache/uv}"],
        locks: &["uv.lock"],
        // The cache and the environments lie on two filesystems, between which there are no hard links.
        environment: &[("UV_LINK_MODE", "copy")],
    },
    Preset {
        name: "cargo",
        signs: &[("Cargo.lock", &[]), ("Cargo.toml", &[])],
        paths: &[
            "${CARGO_HOME:-~/.cargo}/registry",
            "${CARGO_HOME:-~/.cargo}/git",
            "${CARGO_TARGET_DIR:-target}",
        ],
        locks: &["Cargo.lock"],
        environment: &[],
    },
    Preset {
        name: "go",
        signs: &[("go.sum", &[]), ("go.mod", &[]), ("go.work", &[])],
        paths: &[
            "${GOMODCACHE:-${GOPATH:-~/go}/pkg/mod}",
            "${GOCACHE:-~/.cache/go-build}",
        ],
        locks: &["go.sum", "go.work.sum"],
        environment: &[],
    },
    Preset {
        name: "maven",
        signs: &[("pom.xml", &[])],
        paths: &["~/.m2/repository"],
        locks: &["pom.xml"],
        environment: &[],
    },
    Preset {
        name: "gradle",
        signs: &[
            ("build.gradle", &[]),
            ("build.gradle.kts", &[]),
            ("settings.gradle", &[]),
            ("settings.gradle.kts", &[]),
        ],
        paths: &[
            "${GRADLE_USER_HOME:-~/.gradle}/caches",
            "${GRADLE_USER_HOME:-~/.gradle}/wrapper",
        ],
        locks: &[
            "gradle.lockfile",
            "gradle/libs.versions.toml",
            "gradle/wrapper/gradle-wrapper.properties",
        ],
        environment: &[],
    },
    Preset {
        name: "composer",
        signs: &[("composer.lock", &[]), ("composer.json", &[])],
        paths: &["${COMPOSER_CACHE_DIR:-~/.cache/composer}"],
        locks: &["composer.lock"],
        // Else its place depends on the desktop's variables.
        environment: &[("COMPOSER_CACHE_DIR", "~/.cache/composer")],
    },
    Preset {
        name: "bundler",
        signs: &[("Gemfile.lock", &[]), ("Gemfile", &[])],
        paths: &["${BUNDLE_PATH:-vendor/bundle}"],
        locks: &["Gemfile.lock"],
        environment: &[("BUNDLE_PATH", "vendor/bundle")],
    },
    Preset {
        name: "ccache",
        signs: &[("ccache.conf", &[]), (".ccache", &[])],
        paths: &["${CCACHE_DIR:-~/.cache/ccache}"],
        locks: &[],
        // Else an old ~/.ccache is taken where there is one.
        environment: &[("CCACHE_DIR", "~/.cache/ccache")],
    },
    Preset {
        name: "sccache",
        // Nothing in a project tells of it.
        signs: &[],
        paths: &["${SCCACHE_DIR:-~/.cache/sccache}"],
        locks: &[],
        environment: &[("RUSTC_WRAPPER", "sccache")],
    },
    Preset {
        name: "apt",
        signs: &[("Aptfile", &[]), ("apt.txt", &[])],
        paths: &["/var/cache/apt/archives", "/var/lib/apt/lists"],
        locks: &["Aptfile", "apt.txt"],
        environment: &[],
    },
];

/// Finds a preset by its name.
pub fn named(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

/// The presets that a folder tells of, each with the file that does.
pub fn found(folder: &Path) -> Vec<(&'static Preset, &'static str)> {
    let is_there = |name: &&str| folder.join(name).exists();
    let sign = |preset: &'static Preset| {
        let mut signs = preset.signs.iter();
        let sign = signs.find(|(file, not)| is_there(file) && !not.iter().any(&is_there))?;
        Some((preset, sign.0))
    };
    PRESETS.iter().filter_map(sign).collect()
}

impl Preset {
    /// Those of its lock files that a folder has.
    pub fn locks_in(&self, folder: &Path) -> Vec<&'static str> {
        let locks = self.locks.iter().copied();
        locks.filter(|lock| folder.join(lock).is_file()).collect()
    }

    /// Its cache for a job that runs in a folder.
    ///
    /// # Errors
    /// A variable that holds no path.
    pub fn cache(&self, folder: &Path, scope: &Scope) -> Result<Cache, Fault> {
        let place = Place { line: 1, column: 1 };
        let path = |path: &&str| {
            let path = scope.expand(path, place)?;
            let path = values::home_path(&path).map_err(|what| Fault::new(place, what))?;
            Ok(keys::plain(&path))
        };
        Ok(Cache {
            paths: self.paths.iter().map(path).collect::<Result<_, _>>()?,
            lock_files: self.locks_in(folder).iter().map(Into::into).collect(),
            ..Cache::named(&scope.scoped(self.name))
        })
    }

    /// Its cache as an entry of a `.forkvol.yml`.
    pub fn snippet(&self, folder: &Path, because: &str) -> String {
        let mut out = format!("  # {because}\n");
        for (name, value) in self.environment {
            out.push_str(&format!("  # set {name}={value}\n"));
        }
        out.push_str(&format!("  - name: {}\n    paths:\n", self.name));
        for path in self.paths {
            out.push_str(&format!("      - {path}\n"));
        }
        let locks = self.locks_in(folder);
        if !locks.is_empty() {
            out.push_str(&format!("    lock-file: [{}]\n", locks.join(", ")));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::caches::keys::Said;
    use crate::cli::caches::names::Matrix;
    use crate::cli::caches::yaml;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        dir
    }

    #[test]
    fn what_lies_in_a_folder_tells_the_tools() {
        for (files, expected) in [
            (
                &["package-lock.json", "package.json"][..],
                "npm:package-lock.json",
            ),
            (&["package.json"], "npm:package.json"),
            (&["package.json", "yarn.lock"], "yarn:yarn.lock"),
            (&["package.json", "pnpm-lock.yaml"], "pnpm:pnpm-lock.yaml"),
            (&["requirements.txt"], "pip:requirements.txt"),
            (&["uv.lock", "requirements.txt"], "uv:uv.lock"),
            (&["Cargo.toml", "go.mod"], "cargo:Cargo.toml go:go.mod"),
            (&["pom.xml"], "maven:pom.xml"),
            (&["build.gradle.kts"], "gradle:build.gradle.kts"),
            (&["composer.json"], "composer:composer.json"),
            (&["Gemfile.lock"], "bundler:Gemfile.lock"),
            (&["ccache.conf"], "ccache:ccache.conf"),
            (&["Aptfile"], "apt:Aptfile"),
            (&["README.md"], ""),
        ] {
            let found: Vec<String> = found(folder(files).path())
                .iter()
                .map(|(preset, file)| format!("{}:{file}", preset.name))
                .collect();
            assert_eq!(found.join(" "), expected, "{files:?}");
        }
    }

    #[test]
    fn a_snippet_says_what_the_preset_does() {
        let all: Vec<&str> = PRESETS.iter().flat_map(|p| p.locks).copied().collect();
        let none = |name: &str| (name == "GOPATH").then(|| "/go".to_owned());
        let scope = Scope {
            slug: "shop",
            variable: &none,
            matrix: Matrix::None,
        };
        for dir in [folder(&all), folder(&[])] {
            for preset in &PRESETS {
                let cache = preset.cache(dir.path(), &scope).unwrap();
                assert_eq!(cache.volume, format!("shop/{}", preset.name));
                let text = format!("cache:\n{}", preset.snippet(dir.path(), "a file"));
                let root = yaml::parse(&text).unwrap();
                let said = keys::read(root.get("cache").unwrap(), &scope, &mut Vec::new());
                assert_eq!(said.unwrap(), Said::Caches(vec![cache]), "{text}");
            }
        }
        let go = named("go").unwrap().cache(Path::new("/"), &scope).unwrap();
        assert_eq!(go.paths[0], Path::new("/go/pkg/mod"));
    }
}

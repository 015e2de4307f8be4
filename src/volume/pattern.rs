//! Patterns in gitignore syntax: which volumes are meant, and which paths inside of one.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ignore::gitignore::{Gitignore, GitignoreBuilder};

use crate::record;

/// The longest pattern: as long as a path may be.
const LONGEST: usize = 4096;
/// How deep the braces of a pattern may lie in each other. Each depth takes of the stack of whoever reads it.
const BRACES_MAX: usize = 32;

/// Patterns, of which later ones win over earlier ones.
#[derive(Clone, Debug)]
pub struct Patterns {
    all: Gitignore,
    /// The hashes of the only last names of a path that a pattern can name, in order; `None` where one of them ends with more than
    /// a plain name. Whoever looks through many paths passes over most of them by that, and reads none of their names.
    last: Option<Vec<u64>>,
    /// The first names of the patterns that say where a path lies; `None` where one of them begins with more than a plain name.
    first: Option<Vec<Vec<u8>>>,
}

impl Default for Patterns {
    fn default() -> Patterns {
        Patterns {
            all: Gitignore::empty(),
            last: Some(Vec::new()),
            first: Some(Vec::new()),
        }
    }
}

impl Patterns {
    /// Patterns of whole names: `*` stands for anything but a slash, `**` for anything.
    ///
    /// # Errors
    /// Which pattern makes no sense, and why.
    pub fn of_names<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Result<Patterns, String> {
        read(patterns, "/")
    }

    /// Patterns of paths, as a file `.gitignore` at their top has them.
    ///
    /// # Errors
    /// Which pattern makes no sense, and why.
    pub fn of_paths<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Result<Patterns, String> {
        read(patterns, "")
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether they mean this very name or path, and not one above it.
    pub fn name(&self, path: &[u8], is_dir: bool) -> bool {
        let path = Path::new(OsStr::from_bytes(path));
        self.all.matched(path, is_dir).is_ignore()
    }

    /// Whether they may mean a path that ends with the name of this hash (see [`record::hash56`]).
    pub fn may_name(&self, last: u64) -> bool {
        let known = self.last.as_ref();
        known.is_none_or(|known| known.binary_search(&last).is_ok())
    }

    /// Whether it may matter to what lies below a path that it lies there: they may mean something by its place, and not by its own
    /// name alone.
    pub fn may_place_below(&self, path: &[u8]) -> bool {
        let top = path.split(|byte| *byte == b'/').next();
        let known = self.first.as_ref().zip(top);
        known.is_none_or(|(known, top)| known.iter().any(|first| first == top))
    }
}

/// Reads patterns; each is taken as if it began with `anchor`.
fn read<'a>(patterns: impl IntoIterator<Item = &'a str>, anchor: &str) -> Result<Patterns, String> {
    let mut builder = GitignoreBuilder::new("/");
    let (mut last, mut first) = (Some(Vec::new()), Some(Vec::new()));
    for pattern in patterns {
        if pattern.len() > LONGEST || depth(pattern) > BRACES_MAX {
            let start: String = pattern.chars().take(40).collect();
            return Err(format!(
                "the pattern {start:?}… is longer or deeper than {LONGEST} bytes and {BRACES_MAX} braces"
            ));
        }
        let added = builder.add_line(None, &format!("{anchor}{pattern}"));
        added.map_err(|error| format!("the pattern {pattern:?}: {}", why(&error)))?;
        if !pattern.starts_with('#') {
            last = last.zip(last_name(pattern)).map(|(mut known, name)| {
                known.push(record::hash56(&name));
                known
            });
            first = first.zip(first_name(pattern)).map(|(mut known, name)| {
                known.extend(name);
                known
            });
        }
    }
    if let Some(known) = &mut last {
        known.sort_unstable();
    }
    let built = builder.build();
    built
        .map(|all| Patterns { all, last, first })
        .map_err(|error| format!("the patterns: {}", why(&error)))
}

/// The last name of what a pattern matches, if that is always the same one.
fn last_name(line: &str) -> Option<Vec<u8>> {
    let path = line.trim_end().trim_end_matches('/');
    let name = path.strip_prefix('!').unwrap_or(path);
    let name = name.rsplit('/').next().unwrap_or(name);
    // An empty one is no pattern, and names nothing.
    is_plain(path).then(|| name.as_bytes().to_vec())
}

/// The first name of what a pattern matches, if it says where that lies, with more names than one. `None` if it can be any name.
fn first_name(line: &str) -> Option<Option<Vec<u8>>> {
    let path = line.trim_end().trim_end_matches('/');
    let path = path.strip_prefix('!').unwrap_or(path);
    match path.strip_prefix('/').unwrap_or(path).split_once('/') {
        Some((name, _)) if !is_plain(name) => None,
        Some((name, _)) => Some(Some(name.as_bytes().to_vec())),
        None => Some(None),
    }
}

fn is_plain(path: &str) -> bool {
    !path.contains(['*', '?', '[', ']', '{', '}', '\\'])
}

/// How deep braces lie in each other.
fn depth(pattern: &str) -> usize {
    let (mut depth, mut most) = (0_usize, 0);
    for byte in pattern.bytes() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        most = most.max(depth);
    }
    most
}

/// Why a pattern is none, without the pattern as it is: that may hold any byte.
fn why(error: &ignore::Error) -> String {
    let text = match error {
        ignore::Error::Glob { err, .. } => err.clone(),
        other => other.to_string(),
    };
    text.escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_of_names_means_a_whole_name() {
        let means = |pattern: &str, name: &str| {
            let read = Patterns::of_names([pattern]).unwrap();
            read.name(name.as_bytes(), false)
        };
        for (pattern, name, meant) in [
            ("npm", "npm", true),
            ("npm", "shop/npm", false),
            ("npm", "npm/x", false),
            ("*", "shop/npm", false),
            ("shop/*", "shop/npm", true),
            ("**", "shop/npm", true),
            ("shop/**", "shop/a/b", true),
        ] {
            assert_eq!(means(pattern, name), meant, "{pattern} {name}");
        }
        assert!(!Patterns::default().name(b"npm", false));
    }

    #[test]
    fn patterns_that_no_name_is_as_long_or_deep_as_are_refused_before_they_are_read() {
        let deep = "{".repeat(100_000);
        let long = "a".repeat(LONGEST + 1);
        for pattern in [&deep, &long, "a{"] {
            for read in [Patterns::of_names([pattern]), Patterns::of_paths([pattern])] {
                let error = read.unwrap_err();
                assert!(
                    error.starts_with("the pattern ") && error.len() < 200,
                    "{error}"
                );
            }
        }
    }
}

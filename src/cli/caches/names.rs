//! Names of volumes as files write them: variables, what they may bring in, and whose pipeline a name belongs to. Pure.

use std::collections::BTreeMap;

use super::yaml::{Fault, Place};
use crate::cli::values;
use crate::volume::{self, VersionSpec};

/// How deep defaults of variables may lie in each other.
const MAX_DEPTH: usize = 8;
/// The longest text that has variables expanded.
const MAX_TEXT: usize = 4096;
/// The longest part of a name that a variable brings in.
const MAX_VALUE: usize = 64;

/// The values of a matrix for one job; the one of a matrix without dimensions has no name.
pub type Combination = BTreeMap<String, String>;

/// Which values `{{matrix}}` stands for.
#[derive(Clone, Copy, Debug)]
pub enum Matrix<'a> {
    None,
    /// There are several jobs, and which one this is is not known.
    Unknown,
    Is(&'a Combination),
}

/// What names mean where they stand.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    /// The pipeline's name, which is that of its default volume.
    pub slug: &'a str,
    pub variable: &'a dyn Fn(&str) -> Option<String>,
    pub matrix: Matrix<'a>,
}

/// What becomes of a value that is brought into a text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum As {
    Text,
    Name,
}

impl Scope<'_> {
    /// A text with its variables' values.
    pub fn expand(&self, text: &str, place: Place) -> Result<String, Fault> {
        self.expanded(text, As::Text, MAX_DEPTH)
            .map_err(|what| Fault::new(place, what))
    }

    /// The volume that a name stands for: the default one has the pipeline's name, others lie below it.
    pub fn volume(&self, name: &str, global: bool, place: Place) -> Result<String, Fault> {
        let name = self
            .expanded(name, As::Name, MAX_DEPTH)
            .map_err(|what| Fault::new(place, what))?;
        let full = match global {
            true => name,
            false => self.scoped(&name),
        };
        values::volume(&full).map_err(|what| Fault::new(place, what))
    }

    /// The version that a text names: a volume as above, with what follows its `@`.
    pub fn version(&self, text: &str, global: bool, place: Place) -> Result<String, Fault> {
        let (name, which) = match text.split_once('@') {
            Some((name, which)) => (name, Some(which)),
            None => (text, None),
        };
        let volume = self.volume(name, global, place)?;
        let version = match which {
            Some(which) => format!("{volume}@{}", self.expand(which, place)?),
            None => volume,
        };
        match version.parse::<VersionSpec>() {
            Ok(_) => Ok(version),
            Err(error) => Err(Fault::new(place, error.to_string())),
        }
    }

    pub fn scoped(&self, name: &str) -> String {
        let below = name.strip_prefix(self.slug);
        match below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
            true => name.into(),
            false => format!("{}/{name}", self.slug),
        }
    }

    fn expanded(&self, text: &str, form: As, depth: usize) -> Result<String, String> {
        if text.len() > MAX_TEXT {
            return Err(format!("this text is longer than {MAX_TEXT} characters"));
        }
        let value = |value: &str| match form {
            As::Text => value.to_owned(),
            As::Name => volume::legal_part(value, MAX_VALUE),
        };
        let mut out = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['$', '\\', '{']) {
            let (before, from) = rest.split_at(at);
            out.push_str(before);
            rest = if let Some(after) = from.strip_prefix("$$").or_else(|| from.strip_prefix("\\$"))
            {
                out.push('$');
                after
            } else if let Some(after) = from.strip_prefix("${") {
                let end =
                    closing(after).ok_or_else(|| format!("{text:?} has a ${{ without end"))?;
                let (inner, after) = (&after[..end], &after[end + 1..]);
                let name = leading_name(inner);
                let found = (self.variable)(name);
                if name.is_empty() {
                    return Err(format!("{text:?} has a ${{}} without a variable's name"));
                }
                let how = &inner[name.len()..];
                let (or_empty, default) = match (how.strip_prefix(":-"), how.strip_prefix('-')) {
                    (Some(default), _) => (true, Some(default)),
                    (_, Some(default)) => (false, Some(default)),
                    _ if how.is_empty() => (false, None),
                    _ => {
                        return Err(format!(
                            "${{{inner}}} is not understood: ${{{name}}} and ${{{name}:-DEFAULT}} are"
                        ));
                    }
                };
                match (
                    found.filter(|found| !or_empty || !found.is_empty()),
                    default,
                ) {
                    (Some(found), _) => out.push_str(&value(&found)),
                    (None, None) => return Err(not_set(name)),
                    (None, Some(_)) if depth == 0 => {
                        return Err(format!("{name} has too many defaults"));
                    }
                    (None, Some(default)) => {
                        out.push_str(&self.expanded(default, form, depth - 1)?);
                    }
                }
                after
            } else if let Some(after) = from.strip_prefix('$') {
                let name = leading_name(after);
                match name.is_empty() {
                    true => out.push('$'),
                    false => {
                        let found = (self.variable)(name).ok_or_else(|| not_set(name))?;
                        out.push_str(&value(&found));
                    }
                }
                &after[name.len()..]
            } else if let Some((dimension, after)) = matrix_sign(from)
                && !matches!(self.matrix, Matrix::None)
            {
                let Matrix::Is(combination) = self.matrix else {
                    return Err("the step has several jobs: name it by the label of one".into());
                };
                let found = combination.get(dimension);
                let found = found.ok_or_else(|| format!("the matrix has no {dimension:?}"))?;
                out.push_str(&value(found));
                after
            } else {
                let (sign, after) = from.split_at(1);
                out.push_str(sign);
                after
            };
        }
        out.push_str(rest);
        Ok(out)
    }
}

fn not_set(name: &str) -> String {
    format!("the variable {name} is not set; ${{{name}:-DEFAULT}} goes without")
}

fn leading_name(text: &str) -> &str {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let end = text.find(|c| !legal(c)).unwrap_or(text.len());
    match text.starts_with(|c: char| c.is_ascii_digit()) {
        true => "",
        false => &text[..end],
    }
}

/// Where the brace is that closes what was opened before the text.
fn closing(text: &str) -> Option<usize> {
    let mut open = 1;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => open += 1,
            b'}' => open -= 1,
            _ => {}
        }
        if open == 0 {
            return Some(at);
        }
    }
    None
}

/// The dimension that `{{matrix.DIMENSION}}` names at the beginning of a text, and what follows.
fn matrix_sign(text: &str) -> Option<(&str, &str)> {
    let (inner, after) = text.strip_prefix("{{")?.split_once("}}")?;
    let dimension = inner.trim().strip_prefix("matrix")?;
    match dimension.strip_prefix('.') {
        Some(dimension) => Some((dimension, after)),
        None => dimension.is_empty().then_some(("", after)),
    }
}

/// The pipeline's name: as its host says, else after the folder.
pub fn slug(host: Option<&str>, folder: Option<&str>) -> String {
    if let Some(host) = host.filter(|host| !host.is_empty()) {
        return volume::legal_part(host, MAX_VALUE);
    }
    let folder = folder.unwrap_or_default().to_ascii_lowercase();
    let words: Vec<&str> = folder
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    let slug: String = words.join("-").chars().take(MAX_VALUE).collect();
    match slug.trim_end_matches('-') {
        "" => "cache".into(),
        slug => slug.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Place = Place { line: 1, column: 1 };

    fn variable(name: &str) -> Option<String> {
        let value = match name {
            "OS" => "debian12",
            "BRANCH" => "feature/x y",
            "OTHER" => "feature-x-y",
            "FAKE" => "feature-x-y-00000000",
            "UP" => "../../main",
            "TRUST" => "untrusted",
            "EMPTY" => "",
            "HOME_" => "/home/ci",
            "LONG" => return Some("x".repeat(500)),
            _ => return None,
        };
        Some(value.into())
    }

    fn scope() -> Scope<'static> {
        Scope {
            slug: "shop",
            variable: &variable,
            matrix: Matrix::None,
        }
    }

    fn name(text: &str) -> Result<String, String> {
        scope().volume(text, false, HERE).map_err(|f| f.what)
    }

    #[test]
    fn variables_are_expanded_as_shells_write_them() {
        let expand = |text: &str| scope().expand(text, HERE).map_err(|f| f.what);
        for (text, expected) in [
            ("~/x", "~/x"),
            ("${HOME_}/x", "/home/ci/x"),
            ("$HOME_/x", "/home/ci/x"),
            ("a${EMPTY}b", "ab"),
            ("${EMPTY:-c}${EMPTY-d}", "c"),
            ("${NONE:-a}${NONE-b}", "ab"),
            ("${NONE:-${OS}}/x", "debian12/x"),
            ("${NONE:-~/.cargo}/registry", "~/.cargo/registry"),
            ("a$$b\\$c", "a$b$c"),
            ("$ $1 {x} {{matrix}}", "$ $1 {x} {{matrix}}"),
        ] {
            assert_eq!(expand(text).as_deref(), Ok(expected), "{text}");
        }
        for (text, part) in [
            ("${NONE}", "NONE is not set"),
            ("$NONE", "NONE is not set"),
            ("${OS", "without end"),
            (&"x".repeat(5000), "longer than 4096"),
            ("${}", "without a variable's name"),
            ("${OS:0:3}", "not understood"),
            ("${OS\u{e9}}", "not understood"),
            (
                &format!("{}x{}", "${NONE:-".repeat(20), "}".repeat(20)),
                "too many defaults",
            ),
        ] {
            let what = expand(text).unwrap_err();
            assert!(what.contains(part), "{text}: {what}");
        }
    }

    #[test]
    fn what_a_variable_brings_into_a_name_is_one_legal_part_of_it_and_stays_apart_from_others() {
        assert_eq!(name("deps-${OS}").unwrap(), "shop/deps-debian12");
        let hash = &blake3::hash(b"feature/x y").to_hex()[..8];
        let changed = format!("shop/deps/feature-x-y-{hash}");
        assert_eq!(name("deps/${BRANCH}").unwrap(), changed);
        let mut seen = std::collections::HashSet::new();
        for variable in [
            "OS", "BRANCH", "OTHER", "FAKE", "UP", "TRUST", "EMPTY", "LONG",
        ] {
            let made = name(&format!("v/${{{variable}}}")).unwrap();
            assert!(made.starts_with("shop/v/"), "{made}");
            assert_eq!(made.matches('/').count(), 2, "{made}");
            assert!(
                made != "shop/v/untrusted" && seen.insert(made.clone()),
                "{made}"
            );
        }
        // What the file itself says is not changed, but must be legal.
        assert_eq!(name("a/${NONE:-b}").unwrap(), "shop/a/b");
        assert!(name("a b").unwrap_err().contains("is not a volume's name"));
        assert!(name("../x").is_err());
    }

    #[test]
    fn names_are_scoped_to_the_pipeline_unless_they_are_global() {
        for (text, expected) in [
            ("npm", "shop/npm"),
            ("shop", "shop"),
            ("shop/npm", "shop/npm"),
            ("shopping", "shop/shopping"),
        ] {
            assert_eq!(name(text).unwrap(), expected);
        }
        assert_eq!(scope().volume("npm", true, HERE).unwrap(), "npm");
        let version = |text: &str| scope().version(text, false, HERE).map_err(|f| f.what);
        assert_eq!(version("npm").unwrap(), "shop/npm");
        assert_eq!(version("npm@7").unwrap(), "shop/npm@7");
        assert!(version("npm@x").is_err());
    }

    #[test]
    fn a_pipeline_is_called_as_its_host_says_or_as_its_folder() {
        for (host, folder, expected) in [
            (Some("shop-ci"), Some("x"), "shop-ci"),
            (Some(""), Some("My App (2)"), "my-app-2"),
            (None, Some("..."), "cache"),
            (None, None, "cache"),
        ] {
            assert_eq!(slug(host, folder), expected);
        }
        assert!(slug(Some("../up"), None).starts_with("up-"));
    }

    #[test]
    fn a_matrix_stands_for_the_values_of_one_job() {
        let combination = Combination::from([
            ("os".to_owned(), "linux/arm".to_owned()),
            (String::new(), "x".to_owned()),
        ]);
        let mut scope = scope();
        scope.matrix = Matrix::Is(&combination);
        let expand = |text: &str| scope.expand(text, HERE).map_err(|f| f.what);
        assert_eq!(
            expand("t-{{matrix.os}}-{{ matrix }}").unwrap(),
            "t-linux/arm-x"
        );
        assert!(expand("{{matrix.no}}").unwrap_err().contains("no \"no\""));
        let name = scope.volume("t-{{ matrix.os }}", false, HERE).unwrap();
        assert!(name.starts_with("shop/t-linux-arm-"), "{name}");
        scope.matrix = Matrix::Unknown;
        let what = scope.expand("{{matrix}}", HERE).unwrap_err().what;
        assert!(what.contains("several jobs"), "{what}");
    }
}

//! Names of volumes and versions: what is legal, which version a text names, and which names a pattern means.

mod pattern;

use crate::store::{Store, StoreError, Version, VersionRef, Volume};

pub use pattern::Patterns;

/// A text that names a version: `VOLUME`, `VOLUME@head`, `VOLUME@NUMBER` or `VOLUME@xHEX`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VersionSpec {
    pub volume: String,
    pub which: Which,
}

/// Which version of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Which {
    Head,
    Number(u64),
    /// The first hex digits of the version's id.
    Hex(String),
}

/// Why a name or a version is none.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    #[error("{0:?} is not a volume's name: {1}")]
    Volume(String, &'static str),
    #[error(
        "{0:?} is no version: write VOLUME, VOLUME@head, VOLUME@NUMBER or VOLUME@xHEX with at least 6 hex digits"
    )]
    Version(String),
}

/// Checks the name of a volume.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-/".contains(&b);
    let edge = |c: char| c.is_ascii_alphanumeric();
    let why = if name.is_empty() || name.len() > 128 {
        "it must have 1 to 128 characters"
    } else if !name.bytes().all(legal) {
        "only letters, digits and . _ - / are allowed"
    } else if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        "no part between slashes may be empty, \".\" or \"..\""
    } else if !name.starts_with(edge) || !name.ends_with(edge) {
        "it must start and end with a letter or a digit"
    } else {
        return Ok(());
    };
    Err(NameError::Volume(name.into(), why))
}

/// Makes what comes from outside, such as a branch, a legal part of a volume's name, and no more than one part of it. What is not
/// legal becomes `-`, and `longest` characters of it are followed by the first digits of the whole's hash. So is done with what
/// looks as if it had been: no two texts meet.
pub fn legal_part(text: &str, longest: usize) -> String {
    let harmless = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let edge = |c: char| c.is_ascii_alphanumeric();
    let looks_changed = text.rsplit_once('-').is_some_and(|(_, digits)| {
        digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_hexdigit())
    });
    // Such parts of names say who may write to a volume.
    let reserved = matches!(text, "branch" | "untrusted");
    let is_fine = text.len() <= longest
        && text.chars().all(harmless)
        && text.starts_with(edge)
        && text.ends_with(edge);
    if is_fine && !reserved && !looks_changed {
        return text.into();
    }
    let kept: String = text
        .chars()
        .map(|c| if harmless(c) { c } else { '-' })
        .take(longest)
        .collect();
    let kept = match kept.trim_start_matches(|c: char| !edge(c)) {
        "" => "x",
        kept => kept,
    };
    let hash = blake3::hash(text.as_bytes()).to_hex();
    format!("{kept}-{}", &hash[..8])
}

impl std::str::FromStr for VersionSpec {
    type Err = NameError;

    fn from_str(text: &str) -> Result<VersionSpec, NameError> {
        let (volume, which) = text.split_once('@').unwrap_or((text, "head"));
        check_name(volume)?;
        let bad = || NameError::Version(text.into());
        let which = if which == "head" {
            Which::Head
        } else if let Some(hex) = which.strip_prefix('x') {
            let digits =
                hex.len() >= 6 && hex.len() <= 64 && hex.bytes().all(|b| b.is_ascii_hexdigit());
            Which::Hex(digits.then(|| hex.to_ascii_lowercase()).ok_or_else(bad)?)
        } else if !which.is_empty() && which.bytes().all(|b| b.is_ascii_digit()) {
            Which::Number(which.parse().map_err(|_| bad())?)
        } else {
            return Err(bad());
        };
        Ok(VersionSpec {
            volume: volume.into(),
            which,
        })
    }
}

/// What a version was found to be.
pub enum Found {
    Version(Box<(Volume, Version)>),
    /// The volume has no version, or there is no volume of that name.
    Nothing(Option<Volume>),
    Ambiguous,
}

/// Finds the version that a text names.
///
/// # Errors
/// What the store answered.
pub fn find(store: &Store, spec: &VersionSpec) -> Result<Found, StoreError> {
    let Some(volume) = store.volume(&spec.volume)? else {
        return Ok(Found::Nothing(None));
    };
    let version = match &spec.which {
        Which::Head => head(store, &volume)?,
        Which::Number(number) => store.version(VersionRef {
            volume: volume.id,
            number: *number,
        })?,
        Which::Hex(digits) => {
            let versions = store.versions(volume.id)?.into_iter();
            let mut named = versions.filter(|v| Store::version_id(v).to_hex().starts_with(digits));
            let first = named.next();
            if named.next().is_some() {
                return Ok(Found::Ambiguous);
            }
            first
        }
    };
    Ok(match version {
        Some(version) => Found::Version(Box::new((volume, version))),
        None => Found::Nothing(Some(volume)),
    })
}

/// Returns the newest version that was neither set aside as damaged nor taken back, from the head down.
///
/// # Errors
/// What the store answered.
pub fn head(store: &Store, volume: &Volume) -> Result<Option<Version>, StoreError> {
    if volume.head == 0 {
        return Ok(None);
    }
    let at = |number| VersionRef {
        volume: volume.id,
        number,
    };
    let whole = |number| store.damage(at(number)).map(|damage| damage.is_none());
    match store.version(at(volume.head))? {
        Some(version) if whole(volume.head)? => return Ok(Some(version)),
        _ => {}
    }
    for version in store.versions(volume.id)? {
        let taken_back = |(first, last): &(u64, u64)| (*first..=*last).contains(&version.number);
        if version.number < volume.head
            && !volume.taken_back.iter().any(taken_back)
            && whole(version.number)?
        {
            return Ok(Some(version));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_volumes_are_checked() {
        for good in ["npm", "a", "shop/branch/x", "A.b_c-d9"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        let long = "a".repeat(129);
        for bad in [
            "", "/a", "a/", "a//b", "a/./b", "a/../b", ".a", "a-", "a b", "ä", "a@1", &long,
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn parts_of_names_from_outside_are_made_legal_and_stay_apart() {
        assert_eq!(legal_part("pr-12", 48), "pr-12");
        let long = "a".repeat(200);
        let mut texts: Vec<String> = [
            "feature/x",
            "feature-x",
            "feature x",
            "",
            "..",
            "/",
            "ä",
            "-a",
            "a-",
            &long,
            "a@1",
            "branch",
            "untrusted",
        ]
        .map(str::to_owned)
        .into();
        // Whoever knows what a text becomes may call something else by that.
        let known: Vec<String> = texts.iter().map(|text| legal_part(text, 48)).collect();
        texts.extend(known.into_iter().filter(|made| made != "feature-x"));
        let bare = |text: &String| blake3::hash(text.as_bytes()).to_hex()[..8].to_owned();
        texts.extend(texts.clone().iter().map(bare));
        let made: std::collections::HashSet<String> =
            texts.iter().map(|text| legal_part(text, 48)).collect();
        assert_eq!(made.len(), texts.len(), "{made:?}");
        for part in &made {
            assert!(
                check_name(&format!("shop/untrusted/{part}")).is_ok(),
                "{part}"
            );
            assert!(!part.contains('/') && part.len() < 60);
            assert!(part != "branch" && part != "untrusted");
        }
    }

    #[test]
    fn versions_are_read() {
        let parse = |text: &str| text.parse::<VersionSpec>().map(|spec| spec.which).ok();
        assert_eq!(parse("npm"), Some(Which::Head));
        assert_eq!(parse("npm@head"), Some(Which::Head));
        assert_eq!(parse("npm@42"), Some(Which::Number(42)));
        assert_eq!(parse("npm@x9F3c1a"), Some(Which::Hex("9f3c1a".into())));
        for bad in [
            "npm@",
            "npm@x9f3",
            "npm@1a",
            "npm@xzzzzzz",
            "@1",
            "npm@99999999999999999999",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_names_a_version_or_is_named_in_one_line(text in crate::hostile::text("[a-z/]{1,6}(@(head|[0-9]{1,21}|x[0-9a-fA-F]{4,66}))?")) {
            match text.parse::<VersionSpec>() {
                Ok(spec) => {
                    check_name(&spec.volume).unwrap();
                    let which = match &spec.which {
                        Which::Head => "head".to_owned(),
                        Which::Number(number) => number.to_string(),
                        Which::Hex(digits) => format!("x{digits}"),
                    };
                    let again = format!("{}@{which}", spec.volume).parse::<VersionSpec>();
                    assert_eq!(again.ok(), Some(spec));
                }
                Err(error) => {
                    let error = error.to_string();
                    assert!(!error.contains(char::is_control), "{error}");
                }
            }
        }
    }
}

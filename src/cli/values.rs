//! The values that options take: sizes, durations, labels, names, owners.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};

use crate::protocol::Owner;
use crate::sys::process;

/// A number of bytes: an integer with an optional k, m, g or t, 1024-based, and an optional "b" or "ib" after it.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size such as 500m or 20g");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = lower.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let shift = match unit {
        "" | "b" => 0,
        _ => {
            let (letter, rest) = unit.split_at_checked(1).ok_or_else(wrong)?;
            if !matches!(rest, "" | "b" | "ib") {
                return Err(wrong());
            }
            match letter {
                "k" => 10,
                "m" => 20,
                "g" => 30,
                "t" => 40,
                _ => return Err(wrong()),
            }
        }
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is too large"))
}

/// A number of bytes as [`size`] reads it.
pub fn size_text(bytes: u64) -> String {
    let units = [(40, "t"), (30, "g"), (20, "m"), (10, "k")];
    let whole = |(shift, _): &(u32, &str)| bytes > 0 && bytes.trailing_zeros() >= *shift;
    match units.into_iter().find(whole) {
        Some((shift, unit)) => format!("{}{unit}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// A time span as [`duration`] reads it.
pub fn duration_text(seconds: f64) -> String {
    let units = [(86400.0, "d"), (3600.0, "h"), (60.0, "m"), (1.0, "s")];
    let whole = |(unit, _): &(f64, &str)| seconds > 0.0 && seconds % unit == 0.0;
    match units.into_iter().find(whole) {
        Some((unit, name)) => format!("{}{name}", seconds / unit),
        None => format!("{seconds}s"),
    }
}

/// Room for new data: a size that is not nothing.
pub fn room(text: &str) -> Result<u64, String> {
    match size(text)? {
        0 => Err("nothing could be written with a size of 0; --read-only says so".into()),
        size => Ok(size),
    }
}

/// A time span: a number, which may have a fraction, with ms, s, m, h or d after it; seconds without.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration such as 500ms, 30s or 10m");
    let text_ = text.trim();
    let digits = text_
        .bytes()
        .take_while(|b| b.is_ascii_digit() || *b == b'.')
        .count();
    let (number, unit) = text_.split_at(digits);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * unit).map_err(|_| wrong())
}

/// What is recorded with a version: it is shown, sent and kept with everything else that is known of it.
const MESSAGE_MAX: usize = 64 << 10;
const LABEL_KEY_MAX: usize = 256;
const LABEL_VALUE_MAX: usize = 4 << 10;

/// What a version says of itself.
pub fn message(text: &str) -> Result<String, String> {
    within("the message", text, MESSAGE_MAX)?;
    Ok(text.into())
}

fn within(what: &str, text: &str, most: usize) -> Result<(), String> {
    match text.len() > most {
        true => Err(format!(
            "{what} has {} bytes, and {most} is the most",
            text.len()
        )),
        false => Ok(()),
    }
}

/// `K=V`, with a key that is not empty.
pub fn label(text: &str) -> Result<(String, String), String> {
    if let Some((key, value)) = text.split_once('=') {
        within("the key of a label", key, LABEL_KEY_MAX)?;
        within("the value of a label", value, LABEL_VALUE_MAX)?;
    }
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err(format!("{text:?} is not a label of the form KEY=VALUE")),
    }
}

/// A name that another process says again: without one, all whose variable is not set would meet under it.
pub fn name(text: &str) -> Result<String, String> {
    match text.trim().is_empty() {
        true => Err("the name is empty: the variable that it comes from may not be set".into()),
        false => Ok(text.into()),
    }
}

/// A volume's name.
pub fn volume(text: &str) -> Result<String, String> {
    let checked = crate::volume::check_name(text);
    checked.map(|()| text.into()).map_err(|e| e.to_string())
}

/// `UID[:GID]`, `caller` or `keep`.
pub fn owner(text: &str) -> Result<Owner, String> {
    let wrong = || format!("{text:?} is not an owner: UID[:GID], caller or keep");
    let id = |text: &str| {
        text.parse::<u32>()
            .ok()
            .filter(|id| *id != u32::MAX)
            .ok_or_else(wrong)
    };
    match text {
        "keep" => Ok(Owner::Keep),
        "caller" => Ok(Owner::Ids(process::euid(), Some(process::egid()))),
        _ => match text.split_once(':') {
            Some((uid, gid)) => Ok(Owner::Ids(id(uid)?, Some(id(gid)?))),
            None => Ok(Owner::Ids(id(text)?, None)),
        },
    }
}

/// A path in which a leading `~` stands for the caller's home, for no shell may have looked at it.
pub fn home_path(text: &str) -> Result<PathBuf, String> {
    at_home(OsStr::new(text))
}

/// A path as an argument, which need not be text.
pub fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().try_map(|text| at_home(&text))
}

/// As [`home_path`], for what need not be text.
pub fn at_home(text: &OsStr) -> Result<PathBuf, String> {
    let rest = text.as_bytes().strip_prefix(b"~");
    let Some(rest) = rest.filter(|r| r.first().is_none_or(|b| *b == b'/')) else {
        return if text.is_empty() {
            Err("the path is empty".into())
        } else {
            Ok(text.into())
        };
    };
    let home = process::home().ok_or("there is no home folder for ~")?;
    let slashes = rest.iter().take_while(|b| **b == b'/').count();
    Ok(home.join(OsStr::from_bytes(&rest[slashes..])))
}

/// What to do about a mount that is still in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    Detach,
    Fail,
    Wait(Duration),
}

pub fn busy(text: &str) -> Result<Busy, String> {
    match text {
        "detach" => Ok(Busy::Detach),
        "fail" => Ok(Busy::Fail),
        _ => match text.strip_prefix("wait=") {
            Some(time) => duration(time).map(Busy::Wait),
            None => Err(format!(
                "{text:?} is none of detach, fail and wait=DURATION"
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("20g", 20 << 30),
            ("1K", 1024),
            ("3MiB", 3 << 20),
            ("7b", 7),
            ("2tb", 2 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "g",
            "1.5g",
            "-1",
            "1x",
            "1kk",
            "1ibb",
            "99999999t",
            "1 g",
            "1ib",
            "1ä",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn room_is_more_than_nothing() {
        assert_eq!(room("1k"), Ok(1024));
        assert!(room("0").is_err() && room("0g").is_err() && room("x").is_err());
    }

    #[test]
    fn durations() {
        for (text, millis) in [
            ("10", 10_000),
            ("250ms", 250),
            ("1.5m", 90_000),
            ("2h", 7_200_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "s", "-1s", "1w", "1.2.3s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn owners_labels_and_busy() {
        assert_eq!(owner("7:8"), Ok(Owner::Ids(7, Some(8))));
        assert_eq!(owner("7"), Ok(Owner::Ids(7, None)));
        assert!(owner("root").is_err() && owner("4294967295").is_err() && owner("7:").is_err());
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(label("=b").is_err() && label("a").is_err());
        let long = |n| "x".repeat(n);
        assert!(label(&format!("{}={}", long(256), long(4096))).is_ok());
        assert!(label(&format!("{}=", long(257))).is_err());
        assert!(label(&format!("k={}", long(4097))).is_err());
        assert!(message(&long(64 << 10)).is_ok() && message(&long((64 << 10) + 1)).is_err());
        assert_eq!(busy("wait=2s"), Ok(Busy::Wait(Duration::from_secs(2))));
        assert!(busy("wait").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_value_or_is_named_in_one_line(text in crate::hostile::text("[0-9.]{1,20}(ms|s|m|h|d|k|kib|g|tb)?|wait=[0-9]{1,20}d|[0-9]{1,11}:[0-9]{1,11}|a/b=c")) {
            let errors = [
                size(&text).err(),
                duration(&text).err(),
                label(&text).err(),
                volume(&text).err(),
                owner(&text).err(),
                busy(&text).err(),
            ];
            for error in errors.into_iter().flatten() {
                assert!(!error.contains(char::is_control), "{error}");
            }
            home_path(&text).ok();
            if let Ok((key, value)) = label(&text) {
                assert_eq!(format!("{key}={value}"), text);
            }
        }

        #[test]
        fn what_is_written_is_read_as_it_was(bytes: u64, millis in 0_u64..1 << 40) {
            assert_eq!(size(&size_text(bytes)), Ok(bytes));
            let span = Duration::from_millis(millis);
            let read = duration(&duration_text(span.as_secs_f64())).unwrap();
            assert!(read.abs_diff(span) < Duration::from_micros(100), "{span:?}: {read:?}");
        }

        #[test]
        fn every_number_of_bytes_is_a_size(bytes: u64, shift in 0_u32..5) {
            assert_eq!(size(&bytes.to_string()), Ok(bytes));
            let unit = ["", "k", "m", "g", "t"][shift as usize];
            let whole = bytes >> (10 * shift);
            assert_eq!(size(&format!("{whole}{unit}")), Ok(whole << (10 * shift)));
        }
    }
}

//! How a command ends: exit statuses, and an error as one line.

use serde_json::json;

use super::output;
use super::place::Place;
use crate::protocol::{Code, Failure};

/// `run`'s own failures before its command.
pub const RUN_FAILED: u8 = 125;
pub const NOT_EXECUTABLE: u8 = 126;
pub const NOT_FOUND: u8 = 127;

/// What help says of all of them.
pub const STATUSES: &str = "\
Exit status: 0 done, 1 failed, 2 usage, 10 no such volume, version or fork, 11 head moved, \
12 daemon unreachable or of another protocol, 13 store damaged, 14 refused by policy, 15 busy, \
16 no space, 130 interrupted. run: that of its command, 128+N for signal N; its own failures before \
it are 125, 126 (not executable) and 127 (not found). attach and finish: 0 whatever happens to the \
cache, unless --strict; mistakes in the command line or the configuration are 2.";

/// Returns the exit status that stands for a kind of failure.
pub fn status(code: Code) -> u8 {
    match code {
        Code::Failed | Code::Unknown => 1,
        Code::Usage => 2,
        Code::NotFound => 10,
        Code::HeadMoved => 11,
        Code::Unreachable => 12,
        Code::Damaged => 13,
        Code::Policy => 14,
        Code::Busy => 15,
        Code::NoSpace => 16,
        Code::Interrupted => 130,
    }
}

/// Says on standard error what failed, and in which store if one was found; returns the status to end with.
pub fn report(failure: &Failure, status: u8, json: bool, place: Option<&Place>) -> u8 {
    let line = line(failure);
    // A mistake in the arguments alone is one in any store.
    let of_store = failure.of_store || failure.code != Code::Usage;
    match place.filter(|place| of_store && !place.is_named_in(&line)) {
        Some(place) => eprintln!("forkvol: {line}; store: {place}"),
        None => eprintln!("forkvol: {line}"),
    }
    if json {
        let (message, hint) = (&failure.message, &failure.hint);
        let store = place.map(ToString::to_string);
        eprintln!(
            "{}",
            json!({"error": {"code": status, "message": message, "hint": hint, "store": store}})
        );
    }
    status
}

/// The failure and its remedy in one line.
pub fn line(failure: &Failure) -> String {
    let mut line = failure.message.clone();
    if let Some(hint) = &failure.hint {
        line.push_str("; ");
        line.push_str(hint);
    }
    output::one_line(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_with_its_remedy() {
        let failure = Failure::new(Code::Busy, "the\nstore\u{1b}is busy").hint("wait");
        assert_eq!(line(&failure), "the store is busy; wait");
    }

    #[test]
    fn statuses_are_those_of_the_contract() {
        let all = [
            (Code::Failed, 1),
            (Code::Usage, 2),
            (Code::NotFound, 10),
            (Code::HeadMoved, 11),
            (Code::Unreachable, 12),
            (Code::Damaged, 13),
            (Code::Policy, 14),
            (Code::Busy, 15),
            (Code::NoSpace, 16),
            (Code::Interrupted, 130),
        ];
        for (code, expected) in all {
            assert_eq!(status(code), expected);
        }
    }
}

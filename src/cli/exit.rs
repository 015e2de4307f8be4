//! How a command ends: exit statuses, and an error as one line.

use serde_json::json;

use super::output;
use crate::protocol::{Code, Failure};

/// `run`'s own failures before its command.
pub const RUN_FAILED: u8 = 125;
pub const NOT_EXECUTABLE: u8 = 126;
pub const NOT_FOUND: u8 = 127;

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

/// Says on standard error what failed, and returns the status to end with.
pub fn report(failure: &Failure, json: bool) -> u8 {
    report_as(failure, status(failure.code), json)
}

/// As [`report`], with another status than the failure's own.
pub fn report_as(failure: &Failure, status: u8, json: bool) -> u8 {
    eprintln!("forkvol: {}", line(failure));
    if json {
        let (message, hint) = (&failure.message, &failure.hint);
        eprintln!(
            "{}",
            json!({"error": {"code": status, "message": message, "hint": hint}})
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

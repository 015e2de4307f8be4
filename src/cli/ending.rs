//! How a job ended, and what is committed then.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::protocol;

/// When a job commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    OnSuccess,
    Always,
    Never,
    OnChange,
    IfMissing,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    Success,
    Failure,
    Cancelled,
    Unknown,
}

impl End {
    /// The end of a job whose command exited with this status; 0 and those of `successes` are good.
    pub fn of_status(status: i32, successes: &[i32]) -> End {
        if status == 0 || successes.contains(&status) {
            End::Success
        } else {
            End::Failure
        }
    }
}

impl When {
    /// What is asked of the daemon after such an end; `None`: nothing is committed.
    pub fn at(self, end: End) -> Option<protocol::When> {
        match (self, end) {
            (When::Always, End::Success | End::Failure) | (When::OnSuccess, End::Success) => {
                Some(protocol::When::Always)
            }
            (When::OnChange, End::Success) => Some(protocol::When::OnChange),
            (When::IfMissing, End::Success) => Some(protocol::When::IfMissing),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_statuses_than_0_are_good_only_where_that_was_said() {
        assert_eq!(End::of_status(0, &[]), End::Success);
        assert_eq!(End::of_status(3, &[]), End::Failure);
        assert_eq!(End::of_status(3, &[2, 3]), End::Success);
        assert_eq!(End::of_status(-1, &[2, 3]), End::Failure);
    }

    #[test]
    fn a_commit_depends_on_the_end_and_a_cancelled_or_unknown_one_never_commits() {
        let all = protocol::When::Always;
        for (when, success, failure) in [
            (When::OnSuccess, Some(all), None),
            (When::Always, Some(all), Some(all)),
            (When::Never, None, None),
            (When::OnChange, Some(protocol::When::OnChange), None),
            (When::IfMissing, Some(protocol::When::IfMissing), None),
        ] {
            assert_eq!(when.at(End::Success), success, "{when:?}");
            assert_eq!(when.at(End::Failure), failure, "{when:?}");
            assert_eq!(when.at(End::Cancelled), None, "{when:?}");
            assert_eq!(when.at(End::Unknown), None, "{when:?}");
        }
    }
}

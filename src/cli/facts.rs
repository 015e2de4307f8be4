//! What the CI host's variables say of a job's trust. The daemon believes it only from agents, whose hooks' variables the host
//! sets; what cannot be read is not known.

use serde_json::Value;

use super::ForkOptions;
use crate::protocol::Facts;

/// The longest event file that is read.
const MAX_EVENT: u64 = 32 << 20;

/// What is known of this job: what the options say, else what the host's variables say. None outside of any job.
pub fn of_job(options: &ForkOptions) -> Option<Facts> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let event = || {
        use std::io::Read;
        let file = std::fs::File::open(variable("GITHUB_EVENT_PATH")?).ok()?;
        let mut text = Vec::new();
        file.take(MAX_EVENT).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    };
    let host = of_host(variable, event);
    let said = options.foreign.is_some() || options.protected.is_some() || options.scope.is_some();
    if host.is_none() && !said {
        return None;
    }
    let host = host.unwrap_or_default();
    Some(Facts {
        foreign: options.foreign.or(host.foreign),
        protected: options.protected.or(host.protected),
        scope: options.scope.clone().or(host.scope),
    })
}

fn of_host(
    variable: impl Fn(&str) -> Option<String>,
    event: impl FnOnce() -> Option<Value>,
) -> Option<Facts> {
    if variable("BUILDKITE").is_some() {
        return Some(of_buildkite(variable));
    }
    if variable("GITHUB_ACTIONS").is_some() {
        return Some(of_github(variable, event));
    }
    variable("GITLAB_CI").is_some().then(|| of_gitlab(variable))
}

fn of_buildkite(variable: impl Fn(&str) -> Option<String>) -> Facts {
    let number = variable("BUILDKITE_PULL_REQUEST");
    let foreign = match number.as_deref() {
        None => None,
        Some("false") => Some(false),
        Some(_) => {
            let (from, of) = (
                variable("BUILDKITE_PULL_REQUEST_REPO"),
                variable("BUILDKITE_REPO"),
            );
            from.zip(of)
                .map(|(from, of)| repository(&from) != repository(&of))
        }
    };
    let request = number.filter(|n| n != "false").map(|n| format!("pr-{n}"));
    Facts {
        foreign,
        protected: None,
        scope: request.or_else(|| variable("BUILDKITE_BRANCH").map(branch)),
    }
}

/// The scope of a branch, which no request has, whatever its author calls the branch.
fn branch(name: String) -> String {
    format!("branch-{name}")
}

/// A repository, however its address is written: `git@host:a/b.git` and `https://host/a/b` are one.
fn repository(address: &str) -> String {
    let bare = address.split("://").last().unwrap_or_default();
    let bare = bare.rsplit('@').next().unwrap_or_default();
    let bare = bare.trim_end_matches('/').trim_end_matches(".git");
    bare.replacen(':', "/", 1).to_lowercase()
}

fn of_github(
    variable: impl Fn(&str) -> Option<String>,
    event: impl FnOnce() -> Option<Value>,
) -> Facts {
    let event = variable("GITHUB_EVENT_NAME")
        .filter(|name| name != "push")
        .and_then(|_| event());
    let number = |path: &str| event.as_ref()?.pointer(path)?.as_u64();
    let request = number("/pull_request/number").or_else(|| number("/issue/number"));
    let foreign = match variable("GITHUB_EVENT_NAME").as_deref() {
        // They run with the rights of the base, on what others wrote.
        Some("pull_request_target" | "issue_comment" | "workflow_run") => Some(true),
        Some("pull_request" | "pull_request_review" | "pull_request_review_comment") => {
            let from = event
                .as_ref()
                .and_then(|e| e.pointer("/pull_request/head/repo/full_name"))
                .and_then(Value::as_str);
            let of = variable("GITHUB_REPOSITORY");
            from.zip(of)
                .map(|(from, of)| !from.eq_ignore_ascii_case(&of))
        }
        Some(_) => Some(false),
        None => None,
    };
    Facts {
        foreign,
        protected: variable("GITHUB_REF_PROTECTED").and_then(|value| value.parse().ok()),
        scope: request
            .map(|number| format!("pr-{number}"))
            .or_else(|| variable("GITHUB_REF_NAME").map(branch)),
    }
}

fn of_gitlab(variable: impl Fn(&str) -> Option<String>) -> Facts {
    let request = variable("CI_MERGE_REQUEST_IID");
    let foreign = match request {
        None => Some(false),
        Some(_) => {
            let (from, of) = (
                variable("CI_MERGE_REQUEST_SOURCE_PROJECT_ID"),
                variable("CI_MERGE_REQUEST_PROJECT_ID"),
            );
            from.zip(of).map(|(from, of)| from != of)
        }
    };
    Facts {
        foreign,
        protected: variable("CI_COMMIT_REF_PROTECTED").and_then(|value| value.parse().ok()),
        scope: request
            .map(|number| format!("pr-{number}"))
            // Two branches may have one slug.
            .or_else(|| variable("CI_COMMIT_REF_NAME").map(branch)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn facts(variables: &[(&str, &str)], event: Option<Value>) -> Option<Facts> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        of_host(variable, || event)
    }

    #[test]
    fn buildkite_names_the_repository_of_a_pull_request() {
        let of = |number: &str, from: &str| {
            let variables = [
                ("BUILDKITE", "true"),
                ("BUILDKITE_PULL_REQUEST", number),
                ("BUILDKITE_PULL_REQUEST_REPO", from),
                ("BUILDKITE_REPO", "git@github.com:shop/web.git"),
                ("BUILDKITE_BRANCH", "main"),
            ];
            facts(&variables, None).unwrap()
        };
        assert_eq!(of("false", "").foreign, Some(false));
        assert_eq!(of("false", "").scope.as_deref(), Some("branch-main"));
        assert_eq!(of("12", "https://github.com/Shop/web").foreign, Some(false));
        assert_eq!(
            of("12", "git://github.com/evil/web.git").foreign,
            Some(true)
        );
        assert_eq!(
            of("12", "git://github.com/evil/web.git").scope.as_deref(),
            Some("pr-12")
        );
        let unknown = [("BUILDKITE", "true"), ("BUILDKITE_PULL_REQUEST", "12")];
        assert_eq!(facts(&unknown, None).unwrap().foreign, None);
    }

    #[test]
    fn github_says_it_in_the_event() {
        let of = |event: &str, from: Option<&str>| {
            let variables = [
                ("GITHUB_ACTIONS", "true"),
                ("GITHUB_EVENT_NAME", event),
                ("GITHUB_REPOSITORY", "shop/web"),
                ("GITHUB_REF_PROTECTED", "true"),
                ("GITHUB_REF_NAME", "pr-12"),
            ];
            let event = from.map(
                |from| json!({"pull_request": {"number": 12, "head": {"repo": {"full_name": from}}}}),
            );
            facts(&variables, event).unwrap()
        };
        let scope = |event: &str, from| of(event, from).scope;
        assert_eq!(scope("push", None).as_deref(), Some("branch-pr-12"));
        for event in ["pull_request", "pull_request_target"] {
            assert_eq!(scope(event, Some("evil/web")).as_deref(), Some("pr-12"));
        }
        assert_eq!(of("push", None).foreign, Some(false));
        assert_eq!(of("push", None).protected, Some(true));
        assert_eq!(of("pull_request", Some("shop/web")).foreign, Some(false));
        assert_eq!(of("pull_request", Some("evil/web")).foreign, Some(true));
        // The repository it came from has been deleted, or the event cannot be read.
        assert_eq!(of("pull_request", None).foreign, None);
        assert_eq!(
            of("pull_request_target", Some("shop/web")).foreign,
            Some(true)
        );
    }

    #[test]
    fn gitlab_compares_the_projects() {
        let of = |from: &str| {
            let variables = [
                ("GITLAB_CI", "true"),
                ("CI_MERGE_REQUEST_IID", "3"),
                ("CI_MERGE_REQUEST_SOURCE_PROJECT_ID", from),
                ("CI_MERGE_REQUEST_PROJECT_ID", "7"),
                ("CI_COMMIT_REF_PROTECTED", "false"),
            ];
            facts(&variables, None).unwrap()
        };
        assert_eq!(
            (of("7").foreign, of("7").protected),
            (Some(false), Some(false))
        );
        assert_eq!(of("8").foreign, Some(true));
        assert_eq!(of("8").scope.as_deref(), Some("pr-3"));
        let plain = [("GITLAB_CI", "true"), ("CI_COMMIT_REF_NAME", "pr-3")];
        let plain = facts(&plain, None).unwrap();
        assert_eq!(plain.scope.as_deref(), Some("branch-pr-3"));
    }

    #[test]
    fn outside_of_any_host_nothing_is_known() {
        assert_eq!(facts(&[("CI", "true")], None), None);
    }
}

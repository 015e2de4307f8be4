//! What looks at volumes, versions and the store, or tidies them up.

use std::ffi::OsStr;
use std::path::Path;

use serde_json::{Value, json};

use super::forks::{self, take};
use super::mounting;
use super::output::{self, Column, Shown};
use super::{Context, VolumeCommand};
use crate::protocol::{Code, Failure, Mount, Request};

const VOLUME: [Column; 8] = [
    ("VOLUME", "/name", Shown::Plain),
    ("HEAD", "/head", Shown::Plain),
    ("VERSIONS", "/versions", Shown::Plain),
    ("FORKS", "/forks", Shown::Plain),
    ("FILES", "/files", Shown::Plain),
    ("BYTES", "/logical_bytes", Shown::Size),
    ("USED", "/used", Shown::Time),
    ("CREATED", "/created", Shown::Time),
];

pub fn list(context: &Context) -> Result<(), Failure> {
    let answer = context.ask(&Request::Volumes)?;
    let volumes: Vec<Value> = take(&answer, "/volumes")?;
    output::show(context.json, &answer, |_| output::table(&volumes, &VOLUME))
}

pub fn volume(context: &Context, command: VolumeCommand) -> Result<(), Failure> {
    let request = match command {
        VolumeCommand::Show { name } => {
            let answer = context.ask(&Request::Volume { name })?;
            return output::show(context.json, &answer, |a| {
                output::fields(a.pointer("/volume").unwrap_or(&Value::Null), &VOLUME)
            });
        }
        VolumeCommand::Rm { name, force } => Request::RemoveVolume { name, force },
        VolumeCommand::Rename { old, new } => Request::RenameVolume { old, new },
        VolumeCommand::Reset { name } => Request::ResetVolume { name },
    };
    let mut client = context.connect()?;
    let answer = client.call(&request)?;
    for mount in take::<Option<Vec<Mount>>>(&answer, "/mounts")?.unwrap_or_default() {
        mounting::detach(&mut client, &mount);
    }
    output::show(context.json, &answer, |_| String::new())
}

pub fn log(context: &Context, volume: String) -> Result<(), Failure> {
    let answer = context.ask(&Request::Log { volume })?;
    let versions: Vec<Value> = take(&answer, "/versions")?;
    output::show(context.json, &answer, |_| {
        let short: Vec<Value> = versions
            .iter()
            .map(|version| {
                let mut version = version.clone();
                let id = version["id"]
                    .as_str()
                    .and_then(|id| id.get(..13))
                    .map(str::to_owned);
                version["id"] = json!(id);
                version["state"] = json!(state(&version));
                version
            })
            .collect();
        output::table(
            &short,
            &[
                ("NUMBER", "/number", Shown::Plain),
                ("STATE", "/state", Shown::Plain),
                ("ID", "/id", Shown::Plain),
                ("TIME", "/time", Shown::Time),
                ("BASE", "/base", Shown::Plain),
                ("BEFORE", "/previous", Shown::Plain),
                ("FILES", "/files", Shown::Plain),
                ("BYTES", "/logical_bytes", Shown::Size),
                ("NEW", "/new_bytes", Shown::Size),
                ("JOB", "/job", Shown::Plain),
                ("MESSAGE", "/message", Shown::Plain),
                ("LABELS", "/labels", Shown::Pairs),
            ],
        )
    })
}

/// What sets a version apart from others: head, pinned, damaged; nothing for most.
fn state(version: &Value) -> Option<String> {
    let is = |name: &&str| match &version[*name] {
        Value::Bool(is) => *is,
        why => !why.is_null(),
    };
    let words: Vec<&str> = ["head", "pinned", "damaged"]
        .into_iter()
        .filter(is)
        .collect();
    (!words.is_empty()).then(|| words.join(","))
}

pub fn diff(context: &Context, a: &OsStr, b: &OsStr, stat: bool) -> Result<(), Failure> {
    let mut client = context.connect()?;
    let mut side = |text: &OsStr| {
        let name = text.to_string_lossy().into_owned();
        // A volume goes before a folder of that name.
        let mut is_folder =
            || forks::leads_into_a_fork(Path::new(text)) && !forks::has_version(&mut client, &name);
        match forks::is_path(text) || is_folder() {
            true => forks::find(&mut client, text).map(|fork| fork.id),
            false => Ok(name),
        }
    };
    let (a, b) = (side(a)?, side(b)?);
    let answer = client.call(&Request::Diff { a, b })?;
    let changes: Vec<Value> = take(&answer, "/changes")?;
    if !stat {
        return output::show(context.json, &answer, |_| {
            changes.iter().map(change_line).collect()
        });
    }
    let count = |kind: &str| changes.iter().filter(|c| c["kind"] == kind).count();
    let sum = |field: &str| {
        changes
            .iter()
            .filter_map(|c| c[field].as_u64())
            .sum::<u64>()
    };
    let document = json!({
        "a": answer["a"], "b": answer["b"],
        "added": count("added"), "removed": count("removed"),
        "changed": count("changed"), "renamed": count("renamed"),
        "old_bytes": sum("old_size"), "new_bytes": sum("new_size"),
    });
    output::show(context.json, &document, |d| {
        format!(
            "{} added, {} removed, {} changed, {} renamed; {} before, {} after\n",
            d["added"],
            d["removed"],
            d["changed"],
            d["renamed"],
            output::size(sum("old_size")),
            output::size(sum("new_size")),
        )
    })
}

fn change_line(change: &Value) -> String {
    let path = match output::path_text(&change["path"]) {
        root if root.is_empty() => "/".into(),
        path => path,
    };
    match change["kind"].as_str() {
        Some("added") => format!("+ {path}\n"),
        Some("removed") => format!("- {path}\n"),
        Some("renamed") => format!("> {} -> {path}\n", output::path_text(&change["from"])),
        _ => format!("M {path}\n"),
    }
}

pub fn rollback(context: &Context, volume: String, version: String) -> Result<(), Failure> {
    let answer = context.ask(&Request::Rollback { volume, version })?;
    output::show(context.json, &answer, version_name)
}

pub fn pin(context: &Context, version: String, pinned: bool) -> Result<(), Failure> {
    let answer = context.ask(&Request::Pin { version, pinned })?;
    output::show(context.json, &answer, |_| String::new())
}

/// The name of the version that an answer tells of, as it can be given to other commands; nothing if it tells of none.
pub fn version_name(answer: &Value) -> String {
    match &answer["version"] {
        Value::Null => String::new(),
        version => format!(
            "{}@{}\n",
            output::path_text(&version["volume"]),
            version["number"]
        ),
    }
}

pub fn stats(context: &Context, prometheus: bool) -> Result<(), Failure> {
    let answer = context.ask(&Request::Stats)?;
    if prometheus {
        return output::print(exposition(&answer).as_bytes());
    }
    let volumes: Vec<Value> = take(&answer, "/stats/volumes")?;
    output::show(context.json, &answer, |answer| {
        let mut stats = answer["stats"].clone();
        let number = |name: &str| stats[name].as_u64().filter(|n| *n > 0);
        let ratio = number("logical_bytes").zip(number("stored_bytes"));
        let ratio = ratio.map(|(logical, stored)| format!("{:.1}", logical as f64 / stored as f64));
        stats["ratio"] = json!(ratio);
        let mut text = output::fields(
            &stats,
            &[
                ("versions", "/versions", Shown::Plain),
                ("logical", "/logical_bytes", Shown::Size),
                ("unique", "/unique_bytes", Shown::Size),
                ("stored", "/stored_bytes", Shown::Size),
                ("on disk", "/disk_bytes", Shown::Size),
                ("chunks", "/chunks", Shown::Plain),
                ("settled chunks", "/settled_chunks", Shown::Plain),
                ("saved by that", "/saved_bytes", Shown::Size),
                ("ratio", "/ratio", Shown::Plain),
            ],
        );
        text.push_str(&output::table(
            &volumes,
            &[
                ("VOLUME", "/volume", Shown::Plain),
                ("VERSIONS", "/versions", Shown::Plain),
                ("LOGICAL", "/logical_bytes", Shown::Size),
                ("REMOVING FREES", "/exclusive_bytes", Shown::Size),
            ],
        ));
        text
    })
}

/// The text format that Prometheus reads.
fn exposition(answer: &Value) -> String {
    let mut text = String::new();
    let gauges = answer["stats"].as_object().into_iter().flatten();
    for (name, value) in gauges.filter(|(_, value)| value.is_number()) {
        text.push_str(&format!(
            "# TYPE forkvol_{name} gauge\nforkvol_{name} {value}\n"
        ));
    }
    for field in ["versions", "logical_bytes", "exclusive_bytes"] {
        text.push_str(&format!("# TYPE forkvol_volume_{field} gauge\n"));
        for volume in answer["stats"]["volumes"].as_array().into_iter().flatten() {
            let name = volume["volume"].as_str().unwrap_or_default();
            let value = &volume[field];
            text.push_str(&format!(
                "forkvol_volume_{field}{{volume=\"{name}\"}} {value}\n"
            ));
        }
    }
    for (name, value) in answer["counters"].as_object().into_iter().flatten() {
        text.push_str(&format!(
            "# TYPE forkvol_{name}_total counter\nforkvol_{name}_total {value}\n"
        ));
    }
    text
}

pub fn gc(context: &Context, dry_run: bool, settle: bool) -> Result<(), Failure> {
    let answer = context.ask(&Request::Gc { dry_run, settle })?;
    output::show(context.json, &answer, |answer| {
        let names = ["/gc/volumes", "/gc/versions"].map(|list| {
            let names = answer.pointer(list).and_then(Value::as_array);
            names.cloned().unwrap_or_default()
        });
        let verb = if dry_run { "would go" } else { "gone" };
        let line = |name| format!("{verb}: {}\n", output::path_text(name));
        let gone: String = names.iter().flatten().map(line).collect();
        let mut columns = vec![
            ("removed nodes", "/gc/removed_nodes", Shown::Plain),
            ("removed chunks", "/gc/removed_chunks", Shown::Plain),
            ("removed", "/gc/removed_bytes", Shown::Size),
            ("freed on disk", "/gc/freed_bytes", Shown::Size),
        ];
        if settle {
            columns.push(("settled chunks", "/settled/settled_chunks", Shown::Plain));
            columns.push(("saved", "/settled/saved_bytes", Shown::Size));
        }
        gone + &output::fields(answer, &columns)
    })
}

pub fn check(context: &Context, repair: bool, yes: bool) -> Result<(), Failure> {
    let (request, key) = match repair {
        true => (Request::Repair { remove: yes }, "repair"),
        false => (Request::Check, "check"),
    };
    let answer = context.ask(&request)?;
    let problems = answer[key]["problems"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    output::show(context.json, &answer, |answer| {
        let report = &answer[key];
        let mut text: String = problems.iter().map(problem_line).collect();
        text.push_str(&format!(
            "{} versions, {} nodes, {} chunks, {}: {} problems\n",
            report["versions"],
            report["nodes"],
            report["chunks"],
            output::size(report["bytes"].as_u64().unwrap_or(0)),
            problems.len()
        ));
        for (done, what) in [("set_aside", "set aside"), ("removed", "removed")] {
            for version in report[done].as_array().into_iter().flatten() {
                text.push_str(&format!("{} {what}\n", output::path_text(version)));
            }
        }
        for head in report["heads"].as_array().into_iter().flatten() {
            text.push_str(&match head[1].as_u64() {
                Some(0) => format!(
                    "{} has no whole version left\n",
                    output::path_text(&head[0])
                ),
                _ => format!(
                    "the head of {} is {} now\n",
                    output::path_text(&head[0]),
                    head[1]
                ),
            });
        }
        text
    })?;
    if problems.is_empty() || repair {
        return Ok(());
    }
    Err(Failure::new(
        Code::Damaged,
        format!("the store has {} problems", problems.len()),
    )
    .hint(match problems.iter().all(is_of_store) {
        true => "export what is needed, and move the store away to begin an empty one",
        false => "forkvol check --repair sets those versions aside",
    }))
}

/// Whether a problem is of the whole store, and so of no version that could be set aside.
fn is_of_store(problem: &Value) -> bool {
    problem["volume"] == ""
}

fn problem_line(problem: &Value) -> String {
    let paths = problem["paths"].as_array().cloned().unwrap_or_default();
    let paths: Vec<String> = paths.iter().map(output::path_text).collect();
    let version = match is_of_store(problem) {
        true => String::new(),
        false => format!(
            "{}@{}: ",
            output::path_text(&problem["volume"]),
            problem["number"]
        ),
    };
    format!(
        "{version}{}{}{}\n",
        output::path_text(&problem["what"]),
        if paths.is_empty() { "" } else { ": " },
        paths.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prometheus_gets_gauges_and_counters() {
        let answer = json!({
            "stats": {"chunks": 3, "volumes": [{"volume": "a/b", "versions": 1, "logical_bytes": 9, "exclusive_bytes": 8}]},
            "counters": {"forks": 2},
        });
        let text = exposition(&answer);
        assert!(
            text.contains("# TYPE forkvol_chunks gauge\nforkvol_chunks 3\n"),
            "{text}"
        );
        assert!(
            text.contains("forkvol_volume_exclusive_bytes{volume=\"a/b\"} 8\n"),
            "{text}"
        );
        assert!(
            text.contains("# TYPE forkvol_forks_total counter\nforkvol_forks_total 2\n"),
            "{text}"
        );
    }

    #[test]
    fn a_version_that_is_head_pinned_or_damaged_says_so() {
        let of = |head: bool, pinned: bool, damaged: Value| {
            state(&json!({"head": head, "pinned": pinned, "damaged": damaged}))
        };
        assert_eq!(of(false, false, Value::Null), None);
        assert_eq!(of(true, true, Value::Null).unwrap(), "head,pinned");
        assert_eq!(
            of(false, false, json!("a chunk is gone")).unwrap(),
            "damaged"
        );
    }

    #[test]
    fn changes_are_one_line_each() {
        assert_eq!(change_line(&json!({"kind": "added", "path": "a"})), "+ a\n");
        assert_eq!(
            change_line(&json!({"kind": "changed", "path": ""})),
            "M /\n"
        );
        assert_eq!(
            change_line(&json!({"kind": "renamed", "path": "b", "from": "a"})),
            "> a -> b\n"
        );
    }
}

//! Which caches a step of a pipeline has: those of the pipeline's root and its own. Pure.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::Cache;
use super::keys::{self, Said};
use super::names::{Combination, Matrix, Scope};
use super::yaml::{Fault, Kind, Node};

/// How many jobs the matrix of a step may stand for.
const MAX_JOBS: usize = 10_000;

/// The step that is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// A key, a label or `#N`.
    pub name: &'a str,
    /// Another name of the same job, which may tell the jobs of a matrix apart.
    pub label: Option<&'a str>,
}

/// Returns the caches of one step, or of the root alone where none is asked for.
///
/// # Errors
/// A step that is not there, or is there twice; what is wrong with a `cache` key.
pub fn caches(
    root: &Node,
    step: Option<Step>,
    scope: &Scope,
    notes: &mut Vec<Fault>,
) -> Result<Vec<Cache>, Fault> {
    refuse_other_kinds(root)?;
    let own = variables(root);
    let variable = |name: &str| (scope.variable)(name).or_else(|| own.get(name).cloned());
    let scope = &Scope {
        variable: &variable,
        ..*scope
    };
    let of = |node: &Node, scope: &Scope, notes: &mut Vec<Fault>| match node.get("cache") {
        Some(cache) => keys::read(cache, scope, notes),
        None => Ok(Said::Nothing),
    };
    let of_root = match of(root, scope, notes)? {
        Said::Caches(caches) => caches,
        Said::Nothing | Said::Off => Vec::new(),
    };
    let Some(step) = step else {
        return Ok(of_root);
    };
    let (step, combination) = find(root, step, scope)?;
    let scope = &Scope {
        matrix: match (&combination, step.get("matrix")) {
            (_, None) => Matrix::None,
            (Some(combination), _) => Matrix::Is(combination),
            (None, _) => Matrix::Unknown,
        },
        ..*scope
    };
    Ok(match of(&step, scope, notes)? {
        Said::Off => Vec::new(),
        Said::Nothing => of_root,
        Said::Caches(caches) => merge(of_root, caches),
    })
}

/// Refuses what is no pipeline, whichever of its steps is meant.
fn refuse_other_kinds(root: &Node) -> Result<(), Fault> {
    match &root.kind {
        Kind::Text { .. } if !root.is_null() => {
            let what = format!(
                "a pipeline is a map or a list of steps, and this is {}",
                root.is_a()
            );
            Err(root.fault(what))
        }
        Kind::Map(_) if root.get("steps").is_none() => Ok(()),
        Kind::Text { .. } => Ok(()),
        Kind::Map(_) | Kind::List(_) => steps(root).map(drop),
    }
}

/// Why a pipeline has no such step, or cannot say which one it is.
pub fn lacks(root: &Node, name: &str, scope: &Scope) -> Option<Fault> {
    find(root, Step { name, label: None }, scope).err()
}

/// Volumes of both levels; of one that both name, what the step says goes before what the root says.
fn merge(root: Vec<Cache>, step: Vec<Cache>) -> Vec<Cache> {
    let mut out = root;
    for cache in step {
        match out.iter_mut().find(|c| c.volume == cache.volume) {
            Some(known) => known.add(cache),
            None => out.push(cache),
        }
    }
    out
}

/// The pipeline's own variables, which those of the process go before.
fn variables(root: &Node) -> BTreeMap<String, String> {
    let entries = root.get("env").and_then(|env| env.entries());
    let texts = entries.unwrap_or_default().iter();
    texts
        .filter_map(|entry| Some((entry.key.clone(), entry.value.scalar()?.to_owned())))
        .collect()
}

/// All steps in the order of the file; a group stands for those within it.
fn steps(root: &Node) -> Result<Vec<Rc<Node>>, Fault> {
    let list = match &root.kind {
        Kind::List(items) => items,
        _ => match root.get("steps").map(|steps| (steps, &steps.kind)) {
            Some((_, Kind::List(items))) => items,
            Some((steps, _)) => {
                let what = format!("steps are a list, and this is {}", steps.is_a());
                return Err(steps.fault(what));
            }
            None => return Err(root.fault("the pipeline has no steps")),
        },
    };
    let is_step = |item: &Rc<Node>| match item.entries().is_some() || item.text().is_some() {
        true => Ok(()),
        false => {
            let what = format!(
                "a step is a map, or a word such as wait, and this is {}",
                item.is_a()
            );
            Err(item.fault(what))
        }
    };
    let mut out = Vec::new();
    for item in list {
        is_step(item)?;
        if item.get("group").is_none() {
            out.push(command_of(item));
            continue;
        }
        let Some(Kind::List(within)) = item.get("steps").map(|steps| &steps.kind) else {
            return Err(item.fault("a group has a list of steps"));
        };
        if let Some(group) = within.iter().find(|step| step.get("group").is_some()) {
            return Err(group.fault("a group may not lie in another"));
        }
        within.iter().try_for_each(is_step)?;
        out.extend(within.iter().map(command_of));
    }
    Ok(out)
}

/// A step may be written within its kind, as `command: {command: ..., cache: ...}`.
fn command_of(step: &Rc<Node>) -> Rc<Node> {
    let inner = ["command", "commands", "script"]
        .into_iter()
        .filter_map(|kind| step.get(kind))
        .find(|inner| inner.entries().is_some());
    inner.unwrap_or(step).clone()
}

fn first_text<'a>(step: &'a Node, keys: &[&str]) -> Option<&'a str> {
    keys.iter().find_map(|key| step.get(key)?.scalar())
}

/// Finds a step, and which of the jobs of its matrix is meant, where that can be told.
fn find(
    root: &Node,
    wanted: Step,
    scope: &Scope,
) -> Result<(Rc<Node>, Option<Combination>), Fault> {
    let steps = steps(root)?;
    let list = root.get("steps").map_or(root, |steps| steps);
    let number = wanted.name.strip_prefix('#').map(str::parse::<usize>);
    if let Some(Ok(number)) = number {
        let step = number.checked_sub(1).and_then(|at| steps.get(at));
        let step = step.ok_or_else(|| {
            let what = format!(
                "there is no step #{number}: the pipeline has {}",
                steps.len()
            );
            list.fault(what)
        })?;
        return with_job(step, wanted.label, scope);
    }
    for keys in [&["key", "id", "identifier"][..], &["label", "name"]] {
        let mut found = None;
        for step in &steps {
            let Some(text) = first_text(step, keys) else {
                continue;
            };
            let named = |job: &Combination| shown(text, Some(job), scope) == wanted.name;
            let job = match text.contains("{{") {
                true => jobs(step)?.into_iter().find(named),
                false => None,
            };
            if job.is_none() && text != wanted.name && shown(text, None, scope) != wanted.name {
                continue;
            }
            if found.is_some() {
                let what = format!(
                    "a second step is called {:?}: name it by key or #N",
                    wanted.name
                );
                return Err(step.fault(what));
            }
            found = Some((step, job));
        }
        match found {
            Some((step, Some(job))) => return Ok((step.clone(), Some(job))),
            Some((step, None)) => return with_job(step, wanted.label, scope),
            None => {}
        }
    }
    let what = format!("there is no step with the key or label {:?}", wanted.name);
    Err(list.fault(what))
}

/// The job of a step's matrix that has a label, or the only one.
fn with_job(
    step: &Rc<Node>,
    label: Option<&str>,
    scope: &Scope,
) -> Result<(Rc<Node>, Option<Combination>), Fault> {
    let mut jobs = jobs(step)?;
    if jobs.len() == 1 {
        return Ok((step.clone(), jobs.pop()));
    }
    let text = first_text(step, &["label", "name"]);
    let named = |job: &Combination| match (text, label) {
        (Some(text), Some(label)) => shown(text, Some(job), scope) == label,
        _ => false,
    };
    let mut found = jobs.into_iter().filter(named);
    let first = found.next();
    Ok((step.clone(), first.filter(|_| found.next().is_none())))
}

/// A key or a label as the job has it; what cannot be expanded stays as it is.
fn shown(text: &str, job: Option<&Combination>, scope: &Scope) -> String {
    let scope = Scope {
        matrix: job.map_or(Matrix::None, Matrix::Is),
        ..*scope
    };
    let place = super::yaml::Place { line: 0, column: 0 };
    scope.expand(text, place).unwrap_or_else(|_| text.into())
}

/// All combinations of a step's matrix; none if it has no matrix.
fn jobs(step: &Node) -> Result<Vec<Combination>, Fault> {
    let Some(matrix) = step.get("matrix") else {
        return Ok(Vec::new());
    };
    let setup = matrix.get("setup").unwrap_or(matrix);
    let too_many = || matrix.fault(format!("the matrix has more than {MAX_JOBS} jobs"));
    let mut jobs = vec![Combination::new()];
    for (dimension, values) in dimensions(setup)? {
        if jobs.len() * values.len() > MAX_JOBS {
            return Err(too_many());
        }
        let with = |job: &Combination, value: &String| {
            let mut job = job.clone();
            job.insert(dimension.clone(), value.clone());
            job
        };
        jobs = jobs
            .iter()
            .flat_map(|job| values.iter().map(move |value| with(job, value)))
            .collect();
    }
    if let Some(Kind::List(adjustments)) = matrix.get("adjustments").map(|a| &a.kind) {
        for adjustment in adjustments {
            let Some(with) = adjustment.get("with") else {
                return Err(adjustment.fault("an adjustment has with"));
            };
            let mut job = Combination::new();
            for (dimension, values) in dimensions(with)? {
                job.extend(values.into_iter().next().map(|value| (dimension, value)));
            }
            if !jobs.contains(&job) {
                jobs.push(job);
            }
            if jobs.len() > MAX_JOBS {
                return Err(too_many());
            }
        }
    }
    Ok(jobs)
}

/// The dimensions of a matrix and their values; a matrix without dimensions has one without name.
fn dimensions(node: &Node) -> Result<Vec<(String, Vec<String>)>, Fault> {
    let values = |node: &Node| -> Result<Vec<String>, Fault> {
        let items = match &node.kind {
            Kind::List(items) => items.iter().map(|item| &**item).collect(),
            _ => vec![node],
        };
        let value = |item: &&Node| {
            let wrong = || {
                item.fault(format!(
                    "a value of a matrix is a text, not {}",
                    item.is_a()
                ))
            };
            item.scalar().map(str::to_owned).ok_or_else(wrong)
        };
        items.iter().map(value).collect()
    };
    match node.entries() {
        None => Ok(vec![(String::new(), values(node)?)]),
        Some(entries) => entries
            .iter()
            .map(|entry| Ok((entry.key.clone(), values(&entry.value)?)))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::caches::yaml;

    /// The volumes of a step, each as `VOLUME: PATH PATH SIZE`.
    fn volumes_of(text: &str, step: Option<Step>) -> Result<Vec<String>, String> {
        let none = |name: &str| (name == "ARCH").then(|| "arm".to_owned());
        let scope = Scope {
            slug: "shop",
            variable: &none,
            matrix: Matrix::None,
        };
        let caches = yaml::parse(text)
            .and_then(|root| caches(&root, step, &scope, &mut Vec::new()))
            .map_err(|fault| fault.to_string())?;
        let one = |cache: &Cache| {
            let paths: Vec<String> = cache
                .paths
                .iter()
                .map(|p| p.display().to_string())
                .collect();
            let size = cache
                .size
                .map_or_else(String::new, |s| format!(" {}g", s >> 30));
            format!("{}: {}{size}", cache.volume, paths.join(" "))
        };
        Ok(caches.iter().map(one).collect())
    }

    fn volumes(text: &str, name: &str) -> Vec<String> {
        let step = Step { name, label: None };
        volumes_of(text, Some(step)).unwrap_or_else(|fault| panic!("{name}: {fault}"))
    }

    fn fault(text: &str, name: &str) -> String {
        volumes_of(text, Some(Step { name, label: None })).unwrap_err()
    }

    const MANUAL: &str = r#"
cache:
  paths:
    - "node_modules"
  size: "100g"

steps:
  - command: "yarn run build"
    cache: ".build"

  - command: "yarn run test"
    cache:
      - ".build"

  - command: "rspec"
    key: spec
    cache:
      paths:
        - "vendor/bundle"
      size: 20g
      name: "bundle-volume"
"#;

    #[test]
    fn paths_of_both_levels_are_united_and_another_name_is_another_volume() {
        assert_eq!(volumes(MANUAL, "#1"), ["shop: node_modules .build 100g"]);
        assert_eq!(volumes(MANUAL, "#2"), ["shop: node_modules .build 100g"]);
        let both = [
            "shop: node_modules 100g",
            "shop/bundle-volume: vendor/bundle 20g",
        ];
        assert_eq!(volumes(MANUAL, "spec"), both);
        assert_eq!(
            volumes_of(MANUAL, None).unwrap(),
            ["shop: node_modules 100g"]
        );
    }

    #[test]
    fn the_size_of_the_step_wins_and_a_step_may_go_without() {
        let text = "
cache: [{paths: a, size: 30g}, {paths: b, name: n, size: 40g}]
steps:
  - {key: s, command: x, cache: {paths: [a, c], size: 50g}}
  - {key: off, command: x, cache: false}
  - {key: none, command: x}
  - {key: null, command: x, cache: ~}
";
        assert_eq!(volumes(text, "s"), ["shop: a c 50g", "shop/n: b 40g"]);
        assert_eq!(volumes(text, "off"), [""; 0]);
        assert_eq!(volumes(text, "none"), ["shop: a 30g", "shop/n: b 40g"]);
        assert_eq!(volumes(text, "#4"), volumes(text, "none"));
        let own = "{cache: false, steps: [{key: s, cache: a}]}";
        assert_eq!(volumes(own, "s"), ["shop: a"]);
    }

    #[test]
    fn a_step_is_found_by_key_then_by_label_then_by_number() {
        let text = "
steps:
  - {label: two, command: x, cache: a}
  - wait
  - {key: two, label: ':x: b', command: x, cache: b}
  - group: g
    steps:
      - {id: c, command: x, cache: c}
      - command: {label: d, command: x, cache: d}
  - {name: 'e ${ARCH}', command: x, cache: e}
  - {label: twice, command: x}
  - {label: twice, command: x}
";
        for (name, path) in [
            ("two", "b"),
            (":x: b", "b"),
            ("#1", "a"),
            ("#3", "b"),
            ("c", "c"),
            ("#4", "c"),
            ("d", "d"),
            ("e arm", "e"),
            ("e ${ARCH}", "e"),
            ("#6", "e"),
        ] {
            assert_eq!(volumes(text, name), [format!("shop: {path}")], "{name}");
        }
        for (name, start) in [
            ("no", "3:3: there is no step with the key or label \"no\""),
            ("#0", "3:3: there is no step #0"),
            ("#9", "3:3: there is no step #9: the pipeline has 8"),
            ("twice", "12:5: a second step is called \"twice\""),
        ] {
            let fault = fault(text, name);
            assert!(fault.starts_with(start), "{name}: {fault}");
        }
        assert!(fault("cache: a", "x").contains("has no steps"));
        assert_eq!(volumes("[{key: a, cache: b}]", "a"), ["shop: b"]);
    }

    #[test]
    fn anchors_and_merge_keys_are_followed() {
        let text = "
common:
  deps: &deps
    paths: [a]
    size: 30g
  step: &step
    command: x
    cache: *deps
steps:
  - {<<: *step, key: s}
  - key: t
    cache: {<<: *deps, name: own, size: 60g}
";
        assert_eq!(volumes(text, "s"), ["shop: a 30g"]);
        assert_eq!(volumes(text, "t"), ["shop/own: a 60g"]);
    }

    #[test]
    fn the_job_of_a_matrix_is_told_by_its_label() {
        let text = "
env: {SUFFIX: z, ARCH: ignored}
steps:
  - label: 'test {{matrix.os}} {{matrix.node}}'
    key: t
    command: x
    cache: {paths: node_modules, name: 'm-{{matrix.os}}-{{ matrix.node }}-${SUFFIX}-$ARCH'}
    matrix:
      setup: {os: [linux, mac], node: [20, 22]}
      adjustments:
        - with: {os: bsd, node: 18}
  - {key: one, label: 'l {{matrix}}', matrix: [x, y], cache: a}
";
        let of = |os: &str| [format!("shop/m-{os}-z-arm: node_modules")];
        assert_eq!(volumes(text, "test mac 20"), of("mac-20"));
        assert_eq!(volumes(text, "test bsd 18"), of("bsd-18"));
        let step = |name, label| Some(Step { name, label });
        let by_key = volumes_of(text, step("t", Some("test linux 22")));
        assert_eq!(by_key.unwrap(), of("linux-22"));
        assert!(fault(text, "t").starts_with("7:40: the step has several jobs"));
        // Where no name depends on it, it does not matter which job it is.
        assert_eq!(volumes(text, "one"), ["shop: a"]);
        assert_eq!(volumes(text, "l y"), ["shop: a"]);
        let many: Vec<String> = (0..200).map(|n| n.to_string()).collect();
        let many = many.join(",");
        let text = format!("[{{key: a, matrix: {{setup: {{x: [{many}], y: [{many}]}}}}}}]");
        assert!(fault(&text, "a").contains("more than 10000 jobs"));
    }

    #[test]
    fn what_is_of_another_kind_is_refused_whichever_step_is_meant() {
        for (text, start) in [
            ("steps: foo", "1:8: steps are a list, and this is a text"),
            (
                "cache: a\nsteps: {a: b}",
                "2:8: steps are a list, and this is a map",
            ),
            ("steps: [wait, 3]", "1:15: a step is a map, or a word"),
            ("- [a]", "1:3: a step is a map, or a word"),
            ("{steps: [{group: g, steps: [~]}]}", "1:29: a step is a map"),
            ("foo", "1:1: a pipeline is a map or a list of steps"),
            ("cache: 3", "1:8: a path is a text, and this is a number"),
            ("steps: [{key: x, cache: 3}]", "1:25: a path is a text"),
        ] {
            let of = |step| volumes_of(text, step).err().unwrap_or_default();
            let named = fault(text, "x");
            assert!(named.starts_with(start), "{text}: {named}");
            if !text.contains("key: x") {
                assert!(of(None).starts_with(start), "{text}: {}", of(None));
            }
        }
        assert_eq!(volumes_of("", None).unwrap(), [""; 0]);
    }

    #[test]
    fn groups_lie_in_no_groups() {
        let text = "steps:\n  - group: a\n    steps:\n      - {group: b, steps: []}\n";
        assert!(fault(text, "x").starts_with("4:9: a group may not"));
    }
}

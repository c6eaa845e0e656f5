//! Minimum of x'Qx / 2 - m'x over x = f s + u with u >= 0, s = sum x, by the active-set method of Lawson and Hanson (*Solving
//! Least Squares Problems*, 1974, algorithm NNLS): variables enter the set of positive u_k one at a time, the minimum
//! without bounds is found on that set, and variables that it makes negative leave. x / s are the weights.
//!
//! On the set, x is a combination of corners f + (1 - sum f) e_k. With least weights, all corners are near f, and their
//! differences hold what matters: the basis is the corner of the first variable r, then e_j - e_r. Without least weights it
//! is e_k. Q must be positive semidefinite up to rounding. kernels/active_set.cuh has the same operations in the same order.

use crate::abi::{self, MAX_MODALITIES};

/// A number for each modality.
pub(super) type Vector = [f64; MAX_MODALITIES];
/// A symmetric K x K matrix.
pub(super) type Matrix = [Vector; MAX_MODALITIES];

const TOLERANCE: f64 = 1.0 / (1_u64 << abi::DERIVATIVE_BITS) as f64;
pub(super) const LEAST_PIVOT: f64 = 1.0 / (1_u64 << abi::PIVOT_BITS) as f64;
const INDEFINITE: f64 = -1.0 / (1_u64 << abi::INDEFINITE_BITS) as f64;

/// A problem of K modalities.
pub(super) struct Problem {
    pub(super) k: usize,
    pub(super) m: Vector,
    pub(super) q: Matrix,
    /// Whether S is not zero. Q of an infinite S is NaN.
    pub(super) overfits: bool,
    /// f, the least weights, and whether one is above 0.
    pub(super) floors: Vector,
    pub(super) has_floors: bool,
    /// Qf.
    pub(super) qf: Vector,
    /// 1 - sum f.
    pub(super) left: f64,
    /// Of each corner: m'x, and x'Qx.
    pub(super) gain: Vector,
    pub(super) variance: Vector,
}

/// Rows of a Cholesky factor L, LL' = C'QC, where C is the basis of the variables in `order`, and z = L^-1 C'm.
pub(super) struct Factor {
    order: [usize; MAX_MODALITIES],
    count: usize,
    rows: Matrix,
    z: Vector,
}

impl Factor {
    pub(super) fn new() -> Self {
        let zeros = [0.0; MAX_MODALITIES];
        Factor { order: [0; MAX_MODALITIES], count: 0, rows: [zeros; MAX_MODALITIES], z: zeros }
    }

    fn set(&self) -> &[usize] {
        &self.order[..self.count]
    }

    /// Appends the row of variable `v` if its pivot is at least `lowest`, relative to the terms of the diagonal; returns
    /// whether it is.
    pub(super) fn append(&mut self, problem: &Problem, v: usize, lowest: f64) -> bool {
        let Problem { q, m, qf, left, .. } = problem;
        let (i, r) = (self.count, self.order[0]);
        let differs = i > 0 && problem.has_floors;
        let (mut pivot, size, c) = if differs {
            let (variance, terms) = (q[v][v] + q[r][r], q[v][r] + q[v][r]);
            (variance - terms, variance + terms.abs(), m[v] - m[r])
        } else {
            (problem.variance[v], problem.variance[v], problem.gain[v])
        };
        let mut known = 0.0;
        let (above, rest) = self.rows.split_at_mut(i);
        let row = &mut rest[0];
        for j in 0..i {
            let o = self.order[j];
            let mut rest = if !differs {
                q[v][o]
            } else if j == 0 {
                (qf[v] - qf[r]) + left * (q[v][r] - q[r][r])
            } else {
                (q[v][o] - q[v][r]) - (q[o][r] - q[r][r])
            };
            for l in 0..j {
                rest -= row[l] * above[j][l];
            }
            row[j] = rest / above[j][j];
            pivot -= row[j] * row[j];
            known += row[j] * self.z[j];
        }
        // False for a NaN.
        let usable = size > 0.0 && pivot >= lowest * size;
        if usable {
            let least = LEAST_PIVOT * size;
            row[i] = (if pivot > least { pivot } else { least }).sqrt();
            self.z[i] = (c - known) / row[i];
            self.order[i] = v;
            self.count += 1;
        }
        usable
    }

    /// u at the minimum on the set, by position in `order`.
    pub(super) fn solve(&self, problem: &Problem) -> Vector {
        let mut u = [0.0; MAX_MODALITIES];
        let mut sum = 0.0;
        for i in (0..self.count).rev() {
            let mut known = 0.0;
            for j in (i + 1..self.count).rev() {
                known += self.rows[j][i] * u[j];
            }
            u[i] = (self.z[i] - known) / self.rows[i][i];
            if i > 0 {
                sum += u[i];
            }
        }
        if problem.has_floors {
            // What e_j - e_r takes from the corner of r.
            u[0] = problem.left * u[0] - sum;
        }
        u
    }
}

/// Result of [`minimize`].
pub(super) struct Minimum {
    /// u_k, up to a factor.
    pub(super) u: Vector,
    /// Bit k: u_k would be negative without its bound.
    pub(super) bound: u32,
    /// Whether u is the minimum: Q is positive semidefinite, and the method came to its end.
    pub(super) exact: bool,
}

/// The minimum of a problem in which a corner has a gain.
pub(super) fn minimize(problem: &Problem) -> Minimum {
    let mut factor = Factor::new();
    // By position in `factor.order`.
    let mut u = [0.0; MAX_MODALITIES];
    let (mut rejected, mut exact, mut bound) = (0_u32, true, 0);
    let last = abi::ENTRIES * problem.k as u64;
    for entry in 0..=last {
        let (next, negative) = derivatives(problem, &factor, &u, rejected);
        bound = negative;
        let Some(next) = next else { break };
        if entry == last {
            exact = false;
            break;
        }
        exact &= enter(problem, &mut factor, &mut u, next);
        while !advance(problem, &factor, &mut u) {
            exact &= remove_zeros(problem, &mut factor, &mut u);
        }
        // A variable that entered and left at once would enter again.
        rejected = if factor.set().contains(&next) { 0 } else { rejected | 1 << next };
    }
    Minimum { u: by_modality(&factor, &u), bound, exact }
}

fn by_modality(factor: &Factor, u: &Vector) -> Vector {
    let mut all = [0.0; MAX_MODALITIES];
    for (k, u) in factor.set().iter().zip(u) {
        all[*k] = *u;
    }
    all
}

/// The derivatives of the variables that are not in the set: the one with the largest positive one, unless it is
/// `rejected`, and which are negative.
fn derivatives(problem: &Problem, factor: &Factor, u: &Vector, rejected: u32) -> (Option<usize>, u32) {
    let Problem { k, m, q, floors, .. } = problem;
    let mut x = by_modality(factor, u);
    let sum = u[..factor.count].iter().fold(0.0, |sum, u| sum + u);
    for (x, f) in x[..*k].iter_mut().zip(floors) {
        *x += f * (sum / problem.left);
    }
    // m - Qx, and its terms.
    let row = |i: usize| {
        let (mut sum, mut size) = (0.0, m[i].abs());
        for (q, x) in q[i][..*k].iter().zip(&x) {
            let product = q * x;
            sum += product;
            size += product.abs();
        }
        (m[i] - sum, size)
    };
    let empty = factor.count == 0;
    // It is the same for all variables of the set: 0 without least weights.
    let (common, common_size) = if problem.has_floors && !empty { row(factor.order[0]) } else { (0.0, 0.0) };
    let (mut next, mut largest, mut negative) = (None, 0.0, 0);
    for (i, entries) in q[..*k].iter().enumerate() {
        if factor.set().contains(&i) {
            continue;
        }
        let (own, size) = row(i);
        let (derivative, tolerance) =
            if empty { (problem.gain[i], 0.0) } else { (own - common, TOLERANCE * (size + common_size)) };
        if derivative < -tolerance {
            negative |= 1 << i;
        }
        let scaled = if entries[i] > 0.0 { derivative / entries[i].sqrt() } else { derivative };
        if derivative > tolerance && scaled > largest && rejected >> i & 1 == 0 {
            (next, largest) = (Some(i), scaled);
        }
    }
    (next, negative)
}

/// Moves u to the minimum on the set, or towards it until the first variable is 0. Returns whether it is there.
fn advance(problem: &Problem, factor: &Factor, u: &mut Vector) -> bool {
    let target = factor.solve(problem);
    let count = factor.count;
    if target[..count].iter().all(|target| *target > 0.0) {
        *u = target;
        return true;
    }
    // 2 is no limit. A NaN is none either; it makes u NaN, and so the variable leaves.
    let ratio = |u: f64, target: f64| if target > 0.0 { 2.0 } else { u / (u - target) };
    let mut part = 1.0;
    for i in 0..count {
        let ratio = ratio(u[i], target[i]);
        if ratio < part {
            part = ratio;
        }
    }
    for i in 0..count {
        let first = ratio(u[i], target[i]) == part;
        u[i] = if first { 0.0 } else { u[i] + part * (target[i] - u[i]) };
    }
    false
}

/// Removes the variables that are not positive. Returns whether the others have pivots.
fn remove_zeros(problem: &Problem, factor: &mut Factor, u: &mut Vector) -> bool {
    let positive = (0..factor.count).fold(0, |set, i| set | u32::from(u[i] > 0.0) << i);
    rebuild(problem, factor, u, positive.trailing_ones() as usize, positive, None)
}

/// Adds a variable with u = 0. Returns whether all variables have pivots; those that have none are not in the set.
///
/// With least weights the set is in ascending order of Q_kk: differences to the variable of the smallest scale round least.
fn enter(problem: &Problem, factor: &mut Factor, u: &mut Vector, v: usize) -> bool {
    let q = &problem.q;
    let before = factor.set().iter().filter(|k| q[**k][**k] <= q[v][v]).count();
    let position = if problem.has_floors { before } else { factor.count };
    rebuild(problem, factor, u, position, u32::MAX, Some(v))
}

/// Replaces the variables from position `from` on by `entering`, with u = 0, and by those whose bit is in `keep`. Returns
/// whether they all have pivots; those that have none are left out.
fn rebuild(
    problem: &Problem,
    factor: &mut Factor,
    u: &mut Vector,
    from: usize,
    keep: u32,
    entering: Option<usize>,
) -> bool {
    let (order, old, count) = (factor.order, *u, factor.count);
    let kept = (from..count).filter(|i| keep >> i & 1 == 1).map(|i| (order[i], old[i]));
    factor.count = from;
    let mut usable = true;
    for (v, value) in entering.map(|v| (v, 0.0)).into_iter().chain(kept) {
        let position = factor.count;
        if factor.append(problem, v, INDEFINITE) {
            u[position] = value;
        } else {
            usable = false;
        }
    }
    usable
}

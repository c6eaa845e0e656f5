//! What is measured after training: how well pictures find their texts, and what the spaces know.

use anyhow::Result;
use candle_core::Tensor;

use crate::data::{Data, STYLES, Samples};
use crate::network::{Network, directions};

/// Nearest neighbours that vote.
pub(crate) const NEIGHBOURS: usize = 5;

/// Shares of the test pictures, or texts.
#[derive(serde::Serialize)]
pub(crate) struct Measures {
    /// Of pictures whose own text is the nearest, or among the ten nearest, of all test texts.
    pub(crate) recall_at_1: f64,
    pub(crate) recall_at_10: f64,
    /// Of pictures whose nearest training pictures have their style, or category.
    pub(crate) style: f64,
    pub(crate) category: f64,
    /// Of texts whose nearest training texts have their subcategory.
    pub(crate) subcategory: f64,
}

/// Measures a network, and returns the nearest training pictures of each test picture, too.
pub(crate) fn measure(network: &Network<'_>, data: &Data) -> Result<(Measures, Vec<[usize; NEIGHBOURS]>)> {
    let pictures = |samples: &Samples| directions(&network.embed_pictures(&samples.pictures)?);
    let texts = |samples: &Samples| directions(&network.embed_texts(&samples.texts)?);
    let (train, test) = (&data.train, &data.test);
    let (test_pictures, test_texts) = (pictures(test)?, texts(test)?);
    let scores = cosines(&test_pictures, &test_texts)?;
    let own: Vec<usize> = scores.iter().enumerate().map(|(i, scores)| rank(scores, i / STYLES.len())).collect();
    let recall = |most| share(own.iter().map(|rank| *rank < most));
    let near = neighbours(&cosines(&test_pictures, &pictures(train)?)?);
    let near_texts = neighbours(&cosines(&test_texts, &texts(train)?)?);
    let style = |picture: usize| picture % STYLES.len();
    let category = |samples: &Samples, picture: usize| samples.categories[picture / STYLES.len()] as usize;
    let subcategory = |samples: &Samples, text: usize| samples.subcategories[text] as usize;
    let measures = Measures {
        recall_at_1: recall(1),
        recall_at_10: recall(10),
        style: accuracy(&near, style, style),
        category: accuracy(&near, |i| category(test, i), |i| category(train, i)),
        subcategory: accuracy(&near_texts, |i| subcategory(test, i), |i| subcategory(train, i)),
    };
    Ok((measures, near))
}

/// The products of all rows of two matrices.
fn cosines(a: &Tensor, b: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(a.matmul(&b.t()?)?.to_vec2()?)
}

/// How many scores are greater than one of them.
fn rank(scores: &[f32], own: usize) -> usize {
    scores.iter().filter(|score| **score > scores[own]).count()
}

/// The positions of the greatest scores of each row, the greatest first.
fn neighbours(scores: &[Vec<f32>]) -> Vec<[usize; NEIGHBOURS]> {
    let nearest = |scores: &Vec<f32>| {
        let mut nearest = [usize::MAX; NEIGHBOURS];
        let score = |i: usize| scores.get(i).copied().unwrap_or(f32::NEG_INFINITY);
        for (i, value) in scores.iter().enumerate() {
            // Equal scores stay in order.
            if let Some(at) = nearest.iter().position(|other| score(*other) < *value) {
                nearest[at..].rotate_right(1);
                nearest[at] = i;
            }
        }
        nearest
    };
    scores.iter().map(nearest).collect()
}

/// Share of the queries whose neighbours vote for their label. Of labels with as many votes, that of the nearest wins.
fn accuracy(
    nearest: &[[usize; NEIGHBOURS]],
    label: impl Fn(usize) -> usize,
    label_of_neighbour: impl Fn(usize) -> usize,
) -> f64 {
    let vote = |(query, nearest): (usize, &[usize; NEIGHBOURS])| {
        let labels = nearest.map(&label_of_neighbour);
        let votes = |label: usize| labels.iter().filter(|other| **other == label).count();
        // The last of equal ones is the nearest.
        let winner = labels.iter().rev().max_by_key(|label| votes(**label));
        winner == Some(&label(query))
    };
    share(nearest.iter().enumerate().map(vote))
}

fn share(of: impl ExactSizeIterator<Item = bool>) -> f64 {
    let len = of.len() as f64;
    of.filter(|is| *is).count() as f64 / len
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_neighbours_of_given_scores() {
        let scores = vec![0.1, 0.9, 0.5, 0.9, 0.2, -1.0, 0.3];
        assert_eq!([0, 1, 3, 5].map(|own| rank(&scores, own)), [5, 0, 0, 6]);
        assert_eq!(neighbours(&[scores]), [[1, 3, 2, 6, 4]]);
    }

    #[test]
    fn neighbours_vote_and_the_nearest_decides() {
        // Labels 7, 8, 8, 9, 7: as many votes for 7 as for 8, and 7 is nearest. Labels 1, 2, 2, 2, 1: 2.
        let labels = [7, 8, 9, 1, 2];
        let nearest = [[0, 1, 1, 2, 0], [3, 4, 4, 4, 3], [2, 1, 1, 0, 0]];
        let of = |wanted: [usize; 3]| accuracy(&nearest, |query| wanted[query], |i| labels[i]);
        assert_eq!(of([7, 2, 8]), 1.0);
        assert_eq!(of([8, 1, 7]), 0.0);
        assert_eq!(of([7, 2, 9]), 2.0 / 3.0);
    }
}
